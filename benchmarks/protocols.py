"""Who is asked for what: the splits that the retrieval benchmarks are judged on.

Two protocols. The global temporal one is that of the pipeline: fitted on the train split, judged on what the
same users chose in a later window. Leave-one-out is that of the papers on sequence models: the last item of
every user.

Letters: U = users, I = items of the catalogue. Items are codes 0 to I - 1, in catalogue order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import scipy.sparse as sp

from schema.contract import DatasetSpec, load_dataset_spec
from schema.errors import DataError, ShapeError
from schema.tables import INTERACTIONS, ITEMS, prepare_tables
from tfx_pipeline.datasets.archives import prepare_source
from tfx_pipeline.run_result import RunResult, read_run
from trainer.metrics import FloatArray, IntArray

_TIME_ORDER = ("event_time_unix_s", "row_number")


@dataclasses.dataclass(frozen=True)
class Tables:
    """What the protocols are made from.

    Attributes:
      spec: the declaration of the dataset.
      interactions: the contract table.
      items: the contract table, one row per item.
    """

    spec: DatasetSpec
    interactions: pl.DataFrame
    items: pl.DataFrame

    @property
    def item_ids(self) -> list[str]:
        """The catalogue, in the order of the item codes."""
        return self.items["item_id"].to_list()

    def positives(self) -> pl.DataFrame:
        """Positive interactions in (event time, file order), with the code of each item as `item`."""
        codes = self.items.select("item_id").with_row_index("item").cast({"item": pl.Int64})
        chosen = self.interactions.filter(pl.col(self.spec.positive).fill_null(0) > 0)
        return chosen.join(codes, on="item_id", how="inner").sort(_TIME_ORDER)


def prepare_dataset(dataset: str, data_dir: Path | None, work_dir: Path) -> tuple[DatasetSpec, Path]:
    """Prepares an official dataset as `funnel run` does.

    Args:
      dataset: a key of `tfx_pipeline.datasets.archives.ARCHIVES`.
      data_dir: holds the archive or its files; None downloads it.
      work_dir: unpacked files and tables go there; what is there is reused.

    Returns:
      The declaration, and the folder of the contract tables.

    Raises:
      ConfigError, DataError: from `prepare_source` and `prepare_tables`.
    """
    spec = load_dataset_spec(dataset)
    source = prepare_source(dataset, data_dir, work_dir / "source")
    return spec, prepare_tables(spec, source, work_dir / "data" / dataset)


def load_tables(dataset: str, data_dir: Path | None, work_dir: Path) -> Tables:
    """Prepares an official dataset and reads its contract tables.

    Args, Raises: as `prepare_dataset`.
    """
    spec, folder = prepare_dataset(dataset, data_dir, work_dir)
    return Tables(spec, pl.read_parquet(folder / INTERACTIONS), read_catalogue(folder))


def read_catalogue(folder: Path) -> pl.DataFrame:
    """Reads the items of a folder of contract tables, of successive values of an item the first alone."""
    items = pl.read_parquet(folder / ITEMS)
    return items.unique("item_id", keep="first", maintain_order=True)


def read_run_on(spec: DatasetSpec, run_dir: Path) -> RunResult:
    """Reads a finished run that is to be judged on the tables of a benchmark.

    Args:
      spec: the declaration of these tables.
      run_dir: output directory of a `funnel run`.

    Raises:
      DataError: there is no finished run, or it is of another dataset or split.
    """
    run = read_run(run_dir)
    if run.config.dataset != spec:
        raise DataError(
            f"{run_dir} holds a run of {run.dataset!r} whose declaration differs from that of "
            f"{spec.name!r} here; give run folders of this dataset and split"
        )
    return run


@dataclasses.dataclass(frozen=True)
class EvaluationUsers:
    """Users as of the end of training, and what they chose afterwards.

    Attributes:
      user_ids: U ids.
      history: float32 [U, I], 1 where an item is among the user's training positives; not to be recommended.
      positives: for each user the held-out items that are not in the history: codes, distinct, in time order.
    """

    user_ids: tuple[str, ...]
    history: sp.csr_matrix
    positives: tuple[IntArray, ...]

    def __len__(self) -> int:
        return len(self.user_ids)

    def restricted_to(self, items: np.ndarray) -> EvaluationUsers:
        """The users with a positive among some items, and those positives alone.

        Args:
          items: bool [I].
        """
        positives = [codes[items[codes]] for codes in self.positives]
        rows = [row for row, codes in enumerate(positives) if len(codes)]
        return EvaluationUsers(
            tuple(self.user_ids[row] for row in rows),
            self.history[rows],
            tuple(positives[row] for row in rows),
        )


@dataclasses.dataclass(frozen=True)
class TemporalProtocol:
    """A global temporal split: one moment ends training for everybody.

    Attributes:
      item_ids: I ids; all of them are candidates.
      train: float32 [users with a training positive, I], 1 where a user chose an item.
      train_items, train_times_unix_s: int64 [n], item and time of each training positive.
      cold_items: bool [I], True where nobody met the item during training, chosen or not.
      validation: users with a history and positives in the validation window.
      test: the same for the test window.
      cold_test: users without a history and with positives in the test window.
    """

    item_ids: tuple[str, ...]
    train: sp.csr_matrix
    train_items: IntArray
    train_times_unix_s: IntArray
    cold_items: np.ndarray
    validation: EvaluationUsers
    test: EvaluationUsers
    cold_test: EvaluationUsers


def global_temporal(tables: Tables) -> TemporalProtocol:
    """Makes the protocol from the splits of the contract tables.

    Raises:
      DataError: no user has both a history and positives in the validation, or in the test window.
    """
    positives = tables.positives()
    train = positives.filter(pl.col("split") == "train")
    user_ids = train["user_id"].unique(maintain_order=True).to_list()
    row_of = {user_id: row for row, user_id in enumerate(user_ids)}
    num_items = len(tables.items)
    matrix = sp.csr_matrix(
        (
            np.ones(len(train), np.float32),
            ([row_of[user_id] for user_id in train["user_id"]], train["item"].to_numpy()),
        ),
        shape=(len(user_ids), num_items),
    )
    matrix.data[:] = 1.0  # an item chosen twice counts once
    unseen = positives.join(
        train.select("user_id", "item_id").unique(), on=["user_id", "item_id"], how="anti"
    )
    unseen = unseen.sort(_TIME_ORDER)

    def users(split: str, with_history: bool) -> EvaluationUsers:
        held_out = (
            unseen.filter(
                pl.col("split") == split, pl.col("user_id").is_in(list(row_of)) == pl.lit(with_history)
            )
            .group_by("user_id", maintain_order=True)
            .agg(pl.col("item").unique(maintain_order=True))
        )
        ids = tuple(held_out["user_id"])
        history = (
            matrix[[row_of[user_id] for user_id in ids]]
            if with_history
            else sp.csr_matrix((len(ids), num_items), dtype=np.float32)
        )
        return EvaluationUsers(ids, history, tuple(np.array(codes, np.int64) for codes in held_out["item"]))

    met = tables.interactions.filter(pl.col("split") == "train")["item_id"]
    protocol = TemporalProtocol(
        item_ids=tuple(tables.item_ids),
        train=matrix,
        train_items=train["item"].to_numpy(),
        train_times_unix_s=train["event_time_unix_s"].to_numpy(),
        cold_items=(~tables.items["item_id"].is_in(met.implode())).to_numpy(),
        validation=users("eval", True),
        test=users("test", True),
        cold_test=users("test", False),
    )
    for name, evaluated in (("validation", protocol.validation), ("test", protocol.test)):
        if not len(evaluated):
            raise DataError(
                f"{tables.spec.name}: no user of the {name} window has a positive in the train split; "
                "move 'split' in the YAML"
            )
    return protocol


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """The last item of every user is the test item, the one before it the validation item.

    Attributes:
      user_ids: U ids.
      item_ids: I ids; all of them are candidates.
      sequences: for each user the chosen items, oldest first, three or more.
      times_unix_s: when each was chosen, of the shapes of `sequences`.
    """

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    sequences: tuple[IntArray, ...]
    times_unix_s: tuple[IntArray, ...]

    def first(self, num_users: int) -> LeaveOneOut:
        """The same for fewer users."""
        return LeaveOneOut(
            self.user_ids[:num_users],
            self.item_ids,
            self.sequences[:num_users],
            self.times_unix_s[:num_users],
        )

    def train(self, user: int) -> IntArray:
        """What may be learnt from: all but the last two items."""
        return self.sequences[user][:-2]

    def history(self, user: int, split: str) -> IntArray:
        """What precedes the item to find: in the test, the validation item belongs to it."""
        return self.sequences[user][: _PLACES[split]]

    def targets(self, split: str) -> IntArray:
        """int64 [U], the item to find for each user; `split` is "validation" or "test"."""
        return np.array([items[_PLACES[split]] for items in self.sequences], np.int64)


_PLACES = {"validation": -2, "test": -1}
# Scores of all items for some users: int64 [B] users in, float [B, I] out.
ScoreUsers = Callable[[IntArray], FloatArray]


def leave_one_out(tables: Tables) -> LeaveOneOut:
    """Orders the positives of every user by (event time, file order).

    Source: Kang and McAuley, ICDM 2018, arXiv:1808.09781, section IV; ranking all items: Krichene and Rendle,
    KDD 2020, doi:10.1145/3394486.3403226.

    Raises:
      DataError: a user has fewer than three positives.
    """
    grouped = tables.positives().group_by("user_id", maintain_order=True).agg("item", "event_time_unix_s")
    short = grouped.filter(pl.col("item").list.len() < 3)
    if len(short):
        raise DataError(
            f"{len(short):,} users have fewer than 3 positives (for instance {short['user_id'][0]}); "
            "leave-one-out needs one each to train, to validate and to test: leave them out"
        )
    return LeaveOneOut(
        user_ids=tuple(grouped["user_id"]),
        item_ids=tuple(tables.item_ids),
        sequences=tuple(np.array(items, np.int64) for items in grouped["item"]),
        times_unix_s=tuple(np.array(times, np.int64) for times in grouped["event_time_unix_s"]),
    )


def leave_one_out_metrics(
    data: LeaveOneOut,
    score: ScoreUsers,
    split: str,
    k: int = 10,
    batch_size: int = 256,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, FloatArray]:
    """Ranks every item that the user has not chosen yet, and looks up the place of the held-out one.

    With one item to find, HR@k is 1 where its rank is at most k, and NDCG@k is 1 / log2(rank + 1) there; else
    both are 0. A tie counts against the held-out item, so that equal scores everywhere find nothing.

    Args:
      data: the protocol.
      score: int64 [B] places in `data.user_ids` -> float [B, I], larger is better.
      split: "validation" or "test".
      k: cut-off, at least 1.
      batch_size: users per call of `score`.
      on_progress: called with the number of users done after each batch.

    Returns:
      `hit_rate_at_<k>` and `ndcg_at_<k>`, float64 [U].

    Raises:
      ShapeError: the scores are not [B, I].
      DataError: a score is NaN.
    """
    targets = data.targets(split)
    ranks = np.empty(len(targets), np.int64)
    for start in range(0, len(targets), batch_size):
        users = np.arange(start, min(start + batch_size, len(targets)))
        scores = np.array(score(users), np.float64)
        if scores.shape != (len(users), len(data.item_ids)):
            raise ShapeError(
                f"scores have shape {scores.shape}; expected users by items, "
                f"({len(users)}, {len(data.item_ids)})"
            )
        if np.isnan(scores).any():
            raise DataError(f"{np.isnan(scores).sum():,} of {scores.size:,} scores are NaN; check the model")
        rows = np.arange(len(users))
        wanted = scores[rows, targets[users]]
        mask_seen(scores, [data.history(user, split) for user in users])
        scores[rows, targets[users]] = -np.inf
        ranks[users] = 1 + (scores >= wanted[:, np.newaxis]).sum(axis=1)
        on_progress(len(users) + start)
    found = ranks <= k
    return {
        f"hit_rate_at_{k}": found.astype(np.float64),
        f"ndcg_at_{k}": np.where(found, 1.0 / np.log2(ranks + 1.0), 0.0),
    }


def mask_seen(scores: FloatArray, seen: Sequence[IntArray]) -> None:
    """Sets the scores [B, I] of the items that each of B users has seen to minus infinity, in place."""
    rows = np.repeat(np.arange(len(seen)), [len(codes) for codes in seen])
    scores[rows, np.concatenate([np.empty(0, np.int64), *seen])] = -np.inf
