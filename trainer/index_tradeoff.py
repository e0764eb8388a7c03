"""Recall of an index against the time of a query, around the efforts that tuning chose.

Letters: S = sample queries, I = items.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from trainer.index import CandidateIndex, Effort, ScannIndex
from trainer.index_facts import SearchPoint
from trainer.index_tuning import ExactResults, levels, recall_by_slice

# Leaves that are searched, as multiples of the chosen number.
_LEAVES = (0.25, 0.5, 1.0, 2.0, 4.0)
# Queries that are timed for a point, after some that fill caches: enough, or fewer where it takes too long.
_NUM_UNTIMED, _NUM_TIMED, _MAX_TIMED_S = 3, 40, 0.25

_Search = Callable[..., tuple[tf.Tensor, tf.Tensor]]


def search_points(
    index: CandidateIndex, exact: ExactResults, slices: Mapping[str, np.ndarray]
) -> Iterator[SearchPoint]:
    """Measures, for each k that efforts are tuned for, some efforts around the chosen one and exact search.

    Recall is of all sample queries. A time is that of one query by itself, from the call of a TensorFlow
    function in this process until its results are there; the tower that makes the query, and the server, come
    on top. ScaNN takes one thread, exact search those of TensorFlow.

    Args:
      index: built and tuned.
      exact: what exact search finds for the sample queries.
      slices: bool [I] by name, see `index_build.build_index`.
    """
    signature = [tf.TensorSpec([None, *exact.queries.shape[1:]], tf.float32)]
    scalar = tf.TensorSpec([], tf.int32)
    search_exact = tf.function(index.exact.search, input_signature=[*signature, scalar])
    approximate = index.approximate
    if approximate is not None:
        search = tf.function(approximate.search_with, input_signature=[*signature, scalar, scalar, scalar])
    for k in levels(exact.rows.shape[1]):
        if approximate is not None:
            chosen = _chosen(approximate, k)
            for effort in _around(approximate, chosen):
                settings = (k, effort.num_leaves_to_search, effort.num_reordering_candidates)
                yield _point(search, settings, effort == chosen, exact, slices)
        yield _point(search_exact, (k,), approximate is None, exact, slices)


def _chosen(index: ScannIndex, k: int) -> Effort:
    """The effort that a request for k takes."""
    return next(effort for effort in index.efforts if effort.k >= k)


def _around(index: ScannIndex, chosen: Effort) -> Iterator[Effort]:
    """Fewer leaves, the chosen ones, more leaves, ascending; without a partition there is one way only."""
    if not index.num_leaves:
        yield chosen
        return
    leaves = {min(index.num_leaves, max(1, round(share * chosen.num_leaves_to_search))) for share in _LEAVES}
    for num_leaves in sorted(leaves):
        yield Effort(chosen.k, num_leaves, chosen.num_reordering_candidates)


def _point(
    search: _Search,
    settings: Sequence[int],
    is_chosen: bool,
    exact: ExactResults,
    slices: Mapping[str, np.ndarray],
) -> SearchPoint:
    """Measures one way to search; `settings` are k and, of ScaNN, leaves and candidates."""
    k, *effort = settings
    arguments = [tf.constant(value) for value in settings]
    rows, scores = search(exact.queries, *arguments)
    found = exact.found_by(rows.numpy(), scores.numpy(), k)
    p50_ms, p95_ms = np.percentile(_times_ms(search, exact.queries, arguments), [50, 95])
    leaves, candidates = effort or (None, None)
    return SearchPoint(
        k,
        leaves,
        candidates,
        is_chosen,
        float(found.mean()),
        recall_by_slice(found, exact.rows[:, :k], slices),
        float(p50_ms),
        float(p95_ms),
    )


def _times_ms(search: _Search, queries: tf.Tensor, arguments: Sequence[tf.Tensor]) -> list[float]:
    times: list[float] = []
    for place in range(_NUM_UNTIMED + _NUM_TIMED):
        query = queries[place % len(queries)][tf.newaxis]
        started = time.perf_counter()
        rows, _ = search(query, *arguments)
        rows.numpy()
        times.append(1e3 * (time.perf_counter() - started))
        if sum(times) > 1e3 * _MAX_TIMED_S and len(times) > _NUM_UNTIMED:
            break
    return times[_NUM_UNTIMED:]
