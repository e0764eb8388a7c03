"""Made-up item and query vectors with the structure that trained ones have: clusters and unequal norms."""

from __future__ import annotations

import numpy as np

_ITEMS_PER_CLUSTER = 150


def clustered_vectors(
    num_items: int, width: int, num_queries: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws items and queries from one mixture of Gaussians, one for about 150 items.

    Cluster sizes fall with the square root of their rank. The spread within a cluster is that of the cluster
    centres: a vector is as far from its centre as the centre is from the origin. Norms vary log-normally by a
    fifth.

    Returns:
      Items float32 [num_items, width] and queries float32 [num_queries, width].
    """
    rng = np.random.default_rng(seed)
    num_clusters = max(1, num_items // _ITEMS_PER_CLUSTER)
    centres = rng.standard_normal((num_clusters, width), np.float32) / np.sqrt(width, dtype=np.float32)
    sizes = np.arange(1, num_clusters + 1) ** -0.5

    def draw(count: int) -> np.ndarray:
        vectors = rng.standard_normal((count, width), np.float32) / np.sqrt(width, dtype=np.float32)
        vectors += centres[rng.choice(num_clusters, count, p=sizes / sizes.sum())]
        return vectors * np.exp(0.2 * rng.standard_normal((count, 1), np.float32))

    return draw(num_items), draw(num_queries)
