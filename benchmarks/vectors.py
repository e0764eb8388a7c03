"""Made-up item and query vectors with the structure that trained ones have: clusters and unequal norms."""

from __future__ import annotations

import numpy as np

_ITEMS_PER_CLUSTER = 150


def clustered_vectors(
    num_items: int, width: int, num_queries: int, seed: int, decay: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws items and queries from one mixture of Gaussians, one for about 150 items.

    Cluster sizes fall with the square root of their rank. The spread within a cluster is that of the cluster
    centres: a vector is as far from its centre as the centre is from the origin. Norms vary log-normally by a
    fifth.

    Args:
      num_items: items.
      width: of a vector.
      num_queries: queries.
      seed: of the draws.
      decay: the spread along the i-th of `width` orthogonal directions falls with i^-decay; with 0 it is the
        same along all of them. Trained vectors spread unevenly: their effective rank is 43 of 65 on KuaiRand
        and 46 of 65 on MovieLens-1M; with a decay of 0.7 it is 43 of 64, with 0 it is 61. The direction of a
        small difference has about 10, 9, 14 and 23 dimensions in these four.

    Returns:
      Items float32 [num_items, width] and queries float32 [num_queries, width].
    """
    rng = np.random.default_rng(seed)
    num_clusters = max(1, num_items // _ITEMS_PER_CLUSTER)
    spread = np.arange(1, width + 1, dtype=np.float32) ** -decay
    directions = np.linalg.qr(rng.standard_normal((width, width), np.float32))[0]
    mix = directions * (spread / np.linalg.norm(spread))[:, np.newaxis]
    centres = rng.standard_normal((num_clusters, width), np.float32) @ mix
    sizes = np.arange(1, num_clusters + 1) ** -0.5

    def draw(count: int) -> np.ndarray:
        vectors = rng.standard_normal((count, width), np.float32) @ mix
        vectors += centres[rng.choice(num_clusters, count, p=sizes / sizes.sum())]
        return vectors * np.exp(0.2 * rng.standard_normal((count, 1), np.float32))

    return draw(num_items), draw(num_queries)
