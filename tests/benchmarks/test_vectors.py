"""Made-up vectors spread over directions as trained ones do."""

import numpy as np
import pytest

from benchmarks.vectors import clustered_vectors
from trainer.collapse import effective_rank


@pytest.mark.parametrize(("decay", "rank"), [(0.0, 61), (0.7, 43)])
def test_decay_narrows_the_directions_and_keeps_the_lengths(decay: float, rank: int) -> None:
    items, queries = clustered_vectors(5_000, 64, 10, seed=0, decay=decay)
    assert items.shape == (5_000, 64) and queries.shape == (10, 64) and items.dtype == np.float32
    assert effective_rank(items) == pytest.approx(rank, abs=2)
    # Centre and difference have length 1 each; the log-normal factor has a mean square of exp(2 × 0.2²).
    assert np.mean(np.sum(items**2, axis=1)) == pytest.approx(2 * np.exp(0.08), rel=0.15)


def test_items_of_a_cluster_lie_close_and_queries_come_from_the_same_clusters() -> None:
    items, queries = clustered_vectors(3_000, 64, 200, seed=0)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (items, queries)]
    # Half of a vector is its cluster's centre: the cosine of two from one of the 20 clusters is about 0.5.
    assert 0.4 < np.median(np.sort(unit[1] @ unit[0].T, axis=1)[:, -100]) < 0.7
