"""Metrics of what is recommended, whatever users chose.

Letters: Q = queries, K = length of the lists.
"""

import numpy as np
import numpy.typing as npt

from trainer.metrics.arrays import as_ids, first_columns, is_padding


def distinct_items_at_k(ranked: npt.ArrayLike, k: int) -> int:
    """Number of items that are recommended to somebody among the first k.

    Range 0 (no query, or only padding) to min(Q k, size of the catalogue); k = the same k items to everybody.
    Its share of the catalogue is the coverage of Ge, Delgado-Battenfeld and Jannach, RecSys 2010,
    doi:10.1145/1864708.1864761.

    Args:
      ranked: as in `match_positives`.
      k: 1 to K.

    Raises:
      ShapeError: k is not in 1..K.

    >>> distinct_items_at_k([["a", "b", "x"], ["a", "c", "y"], ["d", "", ""]], k=2)
    4
    """
    ids = np.unique(first_columns(as_ids(ranked), k))
    return int(np.count_nonzero(~is_padding(ids)))
