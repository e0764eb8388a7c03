"""What a cheap model would seem to be worth under protocols that leak, beside the honest one.

Each row of the table is the same model on the same log; only the split, or the moment that features are
computed as of, differs. The difference is what a leak would add to the figures of a report.

Letters: n = interactions, U = users, I = items.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator

import lightgbm
import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse as sp
from implicit.nearest_neighbours import CosineRecommender
from implicit.utils import ParameterWarning

from schema.contract import DatasetSpec, TaskKind
from schema.point_in_time import EVENT_TIME, EarlierEvents, key_codes
from tfx_pipeline.leakage.findings import Protocol
from trainer import metrics
from trainer.baselines import popularity, recommend

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

K = 100
NUM_NEIGHBOURS = 100
_MAX_TRAIN_ROWS = 50_000
_MAX_TEST_ROWS = 20_000
_MAX_USERS = 5_000
_SMOOTHING = 20.0
_SEED = 3
_NUM_TREES = 60
_PARAMETERS = {
    "objective": "binary",
    "learning_rate": 0.1,
    "num_leaves": 31,
    "min_data_in_leaf": 50,
    "verbosity": -1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "seed": _SEED,
}


@dataclasses.dataclass(frozen=True)
class _Way:
    """One protocol.

    Attributes:
      name: as the table has it.
      is_honest: whether it asks what serving asks.
      is_random: whether test rows are drawn at random, in place of the latest.
      sees_all: whether features and similarities are computed from the whole log.
    """

    name: str
    is_honest: bool
    is_random: bool
    sees_all: bool


_WAYS = (
    _Way("temporal split, features as of the event", True, False, False),
    _Way("random split, features as of the event", False, True, False),
    _Way("temporal split, features of the full log", False, False, True),
    _Way("random split, features of the full log", False, True, True),
)
NUM_PROTOCOLS = len(_WAYS)


def measure_inflation(
    interactions: pl.DataFrame,
    items: pl.DataFrame,
    spec: DatasetSpec,
    on_protocol: Callable[[str], None] = lambda _: None,
) -> tuple[Protocol, ...]:
    """Trains and judges the cheap models under every protocol.

    Ranking: LightGBM on impressions and smoothed rates of the label of the first binary task that has both
    classes, of the user, of each counter key of the item, and of the user with that key; its AUC on the test
    rows, left out where there is no such task. Retrieval: popularity and
    item-kNN (cosine); recall@100 of the positives of the test rows that are new to the user.

    Args:
      interactions, items: contract tables.
      spec: the declaration.
      on_protocol: called with the name of each protocol before it.

    Returns:
      One row per protocol, the honest one first. A random split has as many test rows as the temporal one.
    """
    found = []
    log = interactions.sort(EVENT_TIME, "row_number")
    positive = (log[spec.positive].fill_null(0) > 0).to_numpy()
    temporal = (log["split"] == "train").to_numpy(), (log["split"] == "test").to_numpy()
    label = _ranked_label(log, spec, temporal)
    for way in _WAYS:
        on_protocol(way.name)
        train, test = _random_split(*temporal) if way.is_random else temporal
        values = {}
        if label is not None:
            values["lightgbm/auc"] = _ranking_auc(log, items, spec, label, train, test, way.sees_all)
        values |= _retrieval_recall(log, items, positive, train, test, way.sees_all)
        found.append(Protocol(way.name, way.is_honest, values))
    return tuple(found)


def _ranked_label(log: pl.DataFrame, spec: DatasetSpec, splits: Iterable[BoolArray]) -> BoolArray | None:
    """The first label of a binary task with both classes in every split.

    The positive of a log of choices alone, such as MovieLens, has one class.
    """
    for task in spec.tasks:
        if task.kind is TaskKind.BINARY:
            label = (log[task.label].fill_null(0) > 0).to_numpy()
            if all(len(np.unique(label[split])) == 2 for split in splits):
                return label
    return None


def _random_split(train: BoolArray, test: BoolArray) -> tuple[BoolArray, BoolArray]:
    """As many train and test rows, drawn from all rows."""
    order = np.random.default_rng(_SEED).permutation(len(train))
    splits = np.zeros(len(train), np.bool_), np.zeros(len(train), np.bool_)
    splits[0][order[: train.sum()]] = True
    splits[1][order[len(order) - test.sum() :]] = True
    return splits


def _ranking_auc(
    log: pl.DataFrame,
    items: pl.DataFrame,
    spec: DatasetSpec,
    label: BoolArray,
    train: BoolArray,
    test: BoolArray,
    sees_all: bool,
) -> float:
    times = log[EVENT_TIME].to_numpy()
    moments = np.full(len(log), times.max() + 1) if sees_all else times
    columns = np.column_stack(list(_rates(log, items, spec, label, moments))).astype(np.float32)
    rng = np.random.default_rng(_SEED)
    rows = [
        rng.permutation(np.flatnonzero(split))[:most]
        for split, most in ((train, _MAX_TRAIN_ROWS), (test, _MAX_TEST_ROWS))
    ]
    data = lightgbm.Dataset(columns[rows[0]], label[rows[0]].astype(np.float64))
    model = lightgbm.train(_PARAMETERS, data, _NUM_TREES)
    return metrics.auc(label[rows[1]].astype(np.float64), np.asarray(model.predict(columns[rows[1]])))


def _rates(
    log: pl.DataFrame, items: pl.DataFrame, spec: DatasetSpec, label: BoolArray, moments: IntArray
) -> Iterator[FloatArray]:
    """Impressions and smoothed mean of the label of each group of events, strictly before each moment."""
    times = log[EVENT_TIME].to_numpy()
    values = np.column_stack([np.ones(len(log)), label]).astype(np.float64)
    users = log["user_id"].rank("dense").cast(pl.Int64).to_numpy()
    prior = label.mean()
    groups = [(np.arange(len(log)), users)]
    for key in spec.counters.keys:
        rows, codes = key_codes(log.select("item_id", EVENT_TIME), items, key)
        groups.append((rows, codes))
        pairs = np.unique(users[rows] * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]
        groups.append((rows, pairs.astype(np.int64)))
    for rows, codes in groups:
        sums = np.zeros_like(values)
        np.add.at(
            sums, rows, EarlierEvents(codes, times[rows], values[rows]).sums(codes, moments[rows], None)
        )
        yield np.log1p(sums[:, 0])
        yield (sums[:, 1] + _SMOOTHING * prior) / (sums[:, 0] + _SMOOTHING)


def _retrieval_recall(
    log: pl.DataFrame,
    items: pl.DataFrame,
    positive: BoolArray,
    train: BoolArray,
    test: BoolArray,
    sees_all: bool,
) -> dict[str, float]:
    codes = items.select(pl.col("item_id").unique(maintain_order=True)).with_row_index("item")
    rows = log.select("user_id", "item_id").join(codes, on="item_id", how="left", maintain_order="left")
    item = rows["item"].cast(pl.Int64).to_numpy()
    user = rows["user_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
    num_users, num_items = int(user.max()) + 1, len(codes)
    chosen = _matrix(user, item, positive & train, num_users, num_items)
    wanted = _matrix(user, item, positive & test, num_users, num_items)
    wanted = sp.csr_matrix(wanted - wanted.multiply(chosen))
    wanted.eliminate_zeros()
    asked = np.flatnonzero(np.diff(wanted.indptr))
    asked = np.random.default_rng(_SEED).permutation(asked)[:_MAX_USERS]
    positives = [wanted[u].indices.tolist() for u in asked]
    seen = [chosen[u].indices.astype(np.int64) for u in asked]
    fitted = positive if sees_all else positive & train
    by_popularity = recommend(popularity(item[fitted], num_items), seen, K)
    model = CosineRecommender(K=NUM_NEIGHBOURS, num_threads=1)
    with warnings.catch_warnings():
        # The library warns that it has to convert the normalised matrix, which it made itself.
        warnings.simplefilter("ignore", ParameterWarning)
        model.fit(_matrix(user, item, fitted, num_users, num_items), show_progress=False)
    by_neighbours, scores = model.recommend(
        asked, chosen[asked], N=min(K, num_items), filter_already_liked_items=True
    )
    by_neighbours = np.where(scores > 0, by_neighbours, -1)
    found = {}
    for name, ranked in (("popularity", by_popularity), ("item_knn", by_neighbours)):
        hits, counts = metrics.match_positives(ranked, positives)
        found[f"{name}/recall_at_{K}"] = metrics.macro_mean(metrics.recall_at_k(hits, counts, K))
    return found


def _matrix(user: IntArray, item: IntArray, rows: BoolArray, num_users: int, num_items: int) -> sp.csr_matrix:
    """1 where the user has a row with the item, else 0: float32 [U, I]."""
    shape = (num_users, num_items)
    table = sp.csr_matrix((np.ones(rows.sum(), np.float32), (user[rows], item[rows])), shape=shape)
    table.data[:] = 1.0
    return table
