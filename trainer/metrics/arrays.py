"""Array types of the metrics, and the checks at their edges."""

from typing import Any

import numpy as np
import numpy.typing as npt

from schema.errors import DataError, ShapeError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def as_ids(ids: npt.ArrayLike, like: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Ids as an array of str, bytes or integers; `like` is what an id array must agree with."""
    array = np.asarray(ids)
    if array.dtype.kind == "O":
        array = np.array(array.tolist()).reshape(array.shape)
    if array.size == 0:
        return array.astype(like.dtype if like is not None else np.str_)
    kinds = like.dtype.kind if like is not None and like.size else "iuUS"
    if array.dtype.kind not in kinds:
        expected = "str, bytes or integers" if like is None else f"{like.dtype}, as the ranked lists"
        raise ShapeError(f"ids have dtype {array.dtype}; expected {expected}: convert one of the two.")
    return array


def is_padding(ids: npt.NDArray[Any]) -> BoolArray:
    return np.asarray(ids < 0 if ids.dtype.kind in "iu" else ids == ids.dtype.type())


def first_columns(table: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    """The first k columns; refuses a k beyond the lists, which would pass metric@K off as metric@k."""
    if table.ndim != 2 or not 1 <= k <= table.shape[1]:
        raise ShapeError(
            f"k is {k} for ranked lists of shape {table.shape}; "
            "expected 1 <= k <= list length: retrieve more items."
        )
    return table[:, :k]


def pairs(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as float64 [n], finite."""
    pair = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape:
        raise ShapeError(f"labels {pair[0].shape} and predictions {pair[1].shape} must both be [n].")
    for name, values in zip(("labels", "predictions"), pair, strict=True):
        if not np.isfinite(values).all():
            raise DataError(
                f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} {name} are NaN or infinite; "
                "drop rows without a label, and check the model for overflow."
            )
    return pair


def binary_pairs(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    pair = pairs(labels, predictions)
    wrong = pair[0][(pair[0] != 0) & (pair[0] != 1)]
    if len(wrong):
        raise DataError(f"binary labels must be 0 or 1; found {wrong[0]} and {len(wrong) - 1} more.")
    return pair


def check_probabilities(predictions: FloatArray) -> None:
    wrong = predictions[(predictions < 0) | (predictions > 1)]
    if len(wrong):
        raise DataError(
            f"predictions must be probabilities in [0, 1]; found {wrong[0]} and {len(wrong) - 1} more: "
            "pass them through a sigmoid."
        )


def mean_or_nan(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def mid_ranks(values: FloatArray, groups: IntArray) -> FloatArray:
    """Ranks 1..n_g within each group, the average rank for equal values."""
    order = np.lexsort((values, groups))
    sorted_groups, sorted_values = groups[order], values[order]
    new_group = np.diff(sorted_groups, prepend=-1) != 0
    new_tie = new_group | (np.diff(sorted_values, prepend=np.nan) != 0)
    tie = np.cumsum(new_tie) - 1
    first_of_tie = np.flatnonzero(new_tie)
    size_of_tie = np.diff(first_of_tie, append=len(values))
    group_start = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    ranks = np.empty(len(values))
    ranks[order] = (first_of_tie + (size_of_tie + 1) / 2)[tie] - group_start
    return ranks
