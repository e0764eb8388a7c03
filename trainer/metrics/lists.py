"""Metrics of what is recommended, whatever users chose: how wide, how new, how alike, how popular.

Letters: Q = queries, K = length of the lists, I = items of the catalogue, A = attributes.

Lists are int64 [Q, K], rows of the catalogue, best first; any negative number is padding or an item that the
catalogue does not have, and is left out. An item stands in a list once. A list without items has NaN.
Intervals over users: `trainer.uncertainty.retrieval_sums` of the values by query.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from schema.errors import DataError, ShapeError
from trainer.metrics.arrays import BoolArray, FloatArray, IntArray, as_ids, first_columns, is_padding

SECONDS_PER_DAY = 86_400
# Bounds the memory of the attributes of some lists to about 32 MB.
_CELLS_PER_CHUNK = 4_000_000


@dataclasses.dataclass(frozen=True)
class CatalogueFacts:
    """What the metrics of lists know about items; what is None is not measured.

    Attributes:
      num_choosers: int [I], users who chose the item in training.
      num_users: users of training.
      upload_time_unix_s: float [I], seconds; NaN where unknown.
      attributes: bool [I, A], such as topics; an item may have several, or none.
    """

    num_choosers: npt.NDArray[np.int64]
    num_users: int
    upload_time_unix_s: FloatArray | None = None
    attributes: BoolArray | None = None

    def __post_init__(self) -> None:
        num_items = len(self.num_choosers)
        for name in ("upload_time_unix_s", "attributes"):
            table = getattr(self, name)
            if table is not None and len(table) != num_items:
                raise ShapeError(f"{name} has {len(table)} rows; expected {num_items}, one per item.")
        if num_items and not 0 <= self.num_choosers.min() <= self.num_choosers.max() <= self.num_users:
            raise DataError(
                f"num_choosers runs from {self.num_choosers.min()} to {self.num_choosers.max()}; expected 0 "
                f"to {self.num_users}, the number of users: count a user once per item."
            )


def list_metrics(
    lists: IntArray, k: int, facts: CatalogueFacts, query_time_unix_s: npt.ArrayLike
) -> dict[str, FloatArray]:
    """Everything that the facts allow to say about the first k of each list.

    Args:
      lists: int64 [Q, K].
      k: 1 to K.
      facts: about the catalogue.
      query_time_unix_s: [Q] or one number, seconds: when the lists were asked for.

    Returns:
      `<metric>_at_<k>` -> float64 [Q], the names of LIST_METRICS that the facts have.

    Raises:
      ShapeError, DataError: from the metrics.
    """
    values = {
        "novelty": novelty_at_k(lists, k, facts.num_choosers, facts.num_users),
        "mean_popularity": mean_popularity_at_k(lists, k, facts.num_choosers),
    }
    if facts.attributes is not None:
        values["intra_list_diversity"] = attribute_diversity_at_k(lists, k, facts.attributes)
    if facts.upload_time_unix_s is not None:
        values["mean_age_days"] = mean_age_days_at_k(lists, k, facts.upload_time_unix_s, query_time_unix_s)
    return {f"{name}_at_{k}": column for name, column in values.items()}


def aggregate_metrics(lists: IntArray, k: int, num_items: int) -> dict[str, float]:
    """What the first k of all lists say together; these are no means over users.

    Returns:
      `<metric>_at_<k>` -> value, the names of AGGREGATE_METRICS.
    """
    return {
        f"coverage_at_{k}": coverage_at_k(lists, k, num_items),
        f"gini_at_{k}": gini_at_k(lists, k, num_items),
    }


def distinct_items_at_k(ranked: npt.ArrayLike, k: int) -> int:
    """Number of items that are recommended to somebody among the first k.

    Range 0 (no query, or only padding) to min(Q k, size of the catalogue); k = the same k items to everybody.
    Its share of the catalogue is `coverage_at_k`.

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


def coverage_at_k(lists: IntArray, k: int, num_items: int) -> float:
    """Share of the catalogue that is recommended to somebody among the first k.

    Range 0 to 1; k / I = the same to everybody. Ties: none. Empty catalogue: NaN; no lists: 0.
    Source: Ge, Delgado-Battenfeld and Jannach, RecSys 2010, doi:10.1145/1864708.1864761.

    Args:
      lists: int64 [Q, K], see the module.
      k: 1 to K.
      num_items: I.

    Raises:
      ShapeError: k is not in 1..K.
      DataError: a row of the catalogue is I or larger.

    >>> coverage_at_k(np.array([[0, 1], [0, 2]]), k=2, num_items=4)
    0.75
    """
    return float((_counts(lists, k, num_items) > 0).mean()) if num_items else float("nan")


def gini_at_k(lists: IntArray, k: int, num_items: int) -> float:
    """How unevenly the first k places go to the items of the catalogue.

    Formula: Σ_j (2 j − I − 1) c_j / ((I − 1) Σ_j c_j), c_1 <= ... <= c_I how often each item is recommended,
    those that never are included. Range 0 (every item equally often) to 1 (one item has all places).
    Ties: equal counts may stand in any order. Nothing recommended, or fewer than two items: NaN.
    Source: Shani and Gunawardana, Recommender Systems Handbook, 2011, section 8.3.6.2.

    Args, Raises: as `coverage_at_k`.

    >>> # counts 0, 1, 1, 2: (-3 * 0 - 1 * 1 + 1 * 1 + 3 * 2) / (3 * 4)
    >>> gini_at_k(np.array([[0, 1], [0, 2]]), k=2, num_items=4)
    0.5
    """
    counts = np.sort(_counts(lists, k, num_items))
    if num_items < 2 or not counts.sum():
        return float("nan")
    weights = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float(weights @ counts / ((num_items - 1) * counts.sum()))


def novelty_at_k(lists: IntArray, k: int, num_choosers: IntArray, num_users: int) -> FloatArray:
    """Mean self-information of the first k items, in bits: how surprising it is that somebody knows them.

    Formula: mean over the items of −log2((c_i + 1) / (U + 1)), c_i of U users chose the item in training; the
    added user keeps the surprise of an item that nobody chose finite.
    Range 0 (everybody knows them all) to log2(U + 1). Ties: do not matter. Empty list: NaN.
    Source: Zhou et al., PNAS 2010, doi:10.1073/pnas.1000488107, as in Castells, Hurley and Vargas,
    Recommender Systems Handbook, 2015, section 26.3.2.

    Args:
      lists: int64 [Q, K], see the module.
      k: 1 to K.
      num_choosers: int [I], c.
      num_users: U.

    Returns:
      float64 [Q].

    Raises:
      ShapeError: k is not in 1..K.
      DataError: a row of the catalogue is I or larger.

    >>> novelty_at_k(np.array([[0, 1, -1]]), k=3, num_choosers=np.array([7, 0, 3]), num_users=7).tolist()
    [1.5]
    """
    surprise = -np.log2((np.asarray(num_choosers) + 1) / (num_users + 1))
    return _mean_of_items(lists, k, surprise)


def mean_popularity_at_k(lists: IntArray, k: int, num_choosers: IntArray) -> FloatArray:
    """Mean number of users who chose the first k items in training: the average recommendation popularity.

    Range 0 upwards. Ties: do not matter. Empty list: NaN.
    Source: Yin et al., VLDB 2012, doi:10.14778/2311906.2311916; Abdollahpouri, Burke and Mobasher, RecSys
    2017, doi:10.1145/3109859.3109912.

    Args, Returns, Raises: as `novelty_at_k`.

    >>> lists = np.array([[0, 1, -1], [-1, -1, -1]])
    >>> mean_popularity_at_k(lists, k=3, num_choosers=np.array([7, 0, 3])).tolist()
    [3.5, nan]
    """
    return _mean_of_items(lists, k, np.asarray(num_choosers, np.float64))


def attribute_diversity_at_k(lists: IntArray, k: int, attributes: BoolArray) -> FloatArray:
    """Intra-list diversity by attributes: mean over the pairs of the first k of what the two do not share.

    Formula: mean over pairs i < j of 1 − |a_i ∩ a_j| / |a_i ∪ a_j|; two items without attributes share
    nothing. Range 0 (all alike) to 1. Ties: do not matter. Fewer than two items: NaN.
    Source: Ziegler et al., WWW 2005, doi:10.1145/1060745.1060754 (1 − their similarity); Jaccard 1912.

    Args:
      lists: int64 [Q, K], see the module.
      k: 1 to K.
      attributes: bool [I, A].

    Returns:
      float64 [Q].

    Raises:
      ShapeError: k is not in 1..K.
      DataError: a row of the catalogue is I or larger.

    >>> attributes = np.array([[1, 0], [1, 1], [0, 1]], dtype=bool)
    >>> # pairs: .5, 1 and .5 apart
    >>> attribute_diversity_at_k(np.array([[0, 1, 2]]), k=3, attributes=attributes).round(4).tolist()
    [0.6667]
    """
    rows, known = _rows(lists, k, len(attributes))
    has = np.pad(np.asarray(attributes, np.float32), ((0, 1), (0, 0)))  # padding picks the row at the end
    size = has.sum(axis=1)
    result = np.full(len(rows), np.nan)
    chunk = max(1, _CELLS_PER_CHUNK // max(1, k * has.shape[1]))
    pairs = np.triu(np.ones((k, k), np.bool_), 1)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        of_list, counts = has[rows[part]], known[part].sum(axis=1)
        shared = of_list @ of_list.transpose(0, 2, 1)
        union = size[rows[part]][:, :, None] + size[rows[part]][:, None, :] - shared
        distance = 1 - np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        counted = pairs & known[part][:, :, None] & known[part][:, None, :]
        total = (distance * counted).sum(axis=(1, 2), dtype=np.float64)
        np.divide(total, counts * (counts - 1) / 2, out=result[part], where=counts > 1)
    return result


def mean_age_days_at_k(
    lists: IntArray, k: int, upload_time_unix_s: FloatArray, query_time_unix_s: npt.ArrayLike
) -> FloatArray:
    """Freshness: mean age of the first k items when they are recommended, in days.

    Formula: mean of max(0, t_query − t_upload) over the items whose upload time is known.
    Range 0 (all brand-new) upwards. Ties: do not matter. No such item: NaN.
    Source: Covington et al., RecSys 2016, doi:10.1145/2959100.2959190, section 3.3, for age at request time.

    Args:
      lists: int64 [Q, K], see the module.
      k: 1 to K.
      upload_time_unix_s: float [I], seconds; NaN where unknown.
      query_time_unix_s: [Q] or one number, seconds.

    Returns:
      float64 [Q].

    Raises:
      ShapeError: k is not in 1..K.
      DataError: a row of the catalogue is I or larger.

    >>> # 2 days, 1 day, unknown
    >>> lists, uploads = np.array([[0, 1, 2]]), np.array([0.0, 86_400.0, np.nan])
    >>> mean_age_days_at_k(lists, 3, uploads, query_time_unix_s=172_800).tolist()
    [1.5]
    """
    rows, known = _rows(lists, k, len(upload_time_unix_s))
    now = np.broadcast_to(np.asarray(query_time_unix_s, np.float64), [len(rows)])
    age = np.maximum(0.0, now[:, None] - np.append(upload_time_unix_s, np.nan)[rows]) / SECONDS_PER_DAY
    return _row_means(age, known & ~np.isnan(age))


def _rows(lists: IntArray, k: int, num_items: int) -> tuple[IntArray, BoolArray]:
    """int64 [Q, k], -1 for any padding; bool [Q, k], where items stand."""
    rows = np.maximum(first_columns(np.asarray(lists), k), -1)
    if rows.size and rows.max() >= num_items:
        raise DataError(f"a list names row {rows.max()} of a catalogue of {num_items} items.")
    return rows, rows >= 0


def _counts(lists: IntArray, k: int, num_items: int) -> IntArray:
    rows, known = _rows(lists, k, num_items)
    return np.bincount(rows[known], minlength=num_items)


def _mean_of_items(lists: IntArray, k: int, values: FloatArray) -> FloatArray:
    rows, known = _rows(lists, k, len(values))
    return _row_means(np.append(values, 0.0)[rows], known)  # padding picks the zero at the end


def _row_means(values: FloatArray, counted: BoolArray) -> FloatArray:
    result = np.full(len(values), np.nan)
    num_counted = counted.sum(axis=1)
    np.divide(np.where(counted, values, 0.0).sum(axis=1), num_counted, out=result, where=num_counted > 0)
    return result
