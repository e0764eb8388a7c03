"""Lints a finished run: reads its tables, examples and Transform graph, and makes every check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import polars as pl
import tensorflow_transform as tft

from schema.contract import DatasetSpec
from schema.point_in_time import join_as_of
from schema.tables import INTERACTIONS, ITEMS, USERS, read_summary
from tfx_pipeline.leakage import recorded
from tfx_pipeline.leakage.associations import MAX_AUC, check_associations
from tfx_pipeline.leakage.findings import LeakageReport, Protocol
from tfx_pipeline.leakage.known_past import KnownPast
from tfx_pipeline.leakage.past_checks import (
    check_recomputed,
    check_splits,
    check_states,
    check_strictly_before,
)
from tfx_pipeline.leakage.transform_checks import TrainRows, check_quantiles, check_vocabularies
from trainer import features

_SEED = 11


@dataclasses.dataclass(frozen=True)
class RunData:
    """Where a run keeps what is linted.

    Attributes:
      tables_dir: contract tables.
      interactions: folder of the interaction examples, with Split-train and so on.
      user_states: folder of the user-state examples.
      catalogue: folder of the catalogue examples.
      transform_graph: the Transform output.
    """

    tables_dir: Path
    interactions: Path
    user_states: Path
    catalogue: Path
    transform_graph: Path


@dataclasses.dataclass(frozen=True)
class LintSettings:
    """How much is looked at.

    Attributes:
      recomputed: examples per split, user states and items that are recomputed.
      judged: examples of train and of eval that associations are judged on.
      max_auc: above it a feature alone is taken for a leak.
      inflation: whether cheap models are trained to show what leaks would add.
    """

    recomputed: int = 200
    judged: int = 50_000
    max_auc: float = MAX_AUC
    inflation: bool = True


def lint(
    spec: DatasetSpec,
    max_positives_per_user: int,
    data: RunData,
    settings: LintSettings,
    on_step: Callable[[str], None] = lambda _: None,
) -> LeakageReport:
    """Makes every check.

    Args:
      spec: the declaration of the run.
      max_positives_per_user: of the run, see `tfx_pipeline.config.ExamplesConfig`.
      data: its tables, examples and graph.
      settings: how much is looked at.
      on_step: called with what is done next, in words.

    Raises:
      DataError: tables or examples are absent or cannot be read.
    """
    summary = read_summary(data.tables_dir)
    on_step("reading tables")
    interactions, users, items = (
        pl.read_parquet(data.tables_dir / name) for name in (INTERACTIONS, USERS, ITEMS)
    )
    on_step("reading examples")
    splits = {
        split: recorded.read_split(
            f"{data.interactions}/Split-{split}/*.gz",
            recorded.interaction_dtypes(spec),
            settings.recomputed if split == "test" else max(settings.judged, settings.recomputed),
            _SEED,
        )
        for split in features.SPLITS
    }
    few = {split: found.sample.head(settings.recomputed) for split, found in splits.items()}
    states = recorded.read_sample(
        f"{data.user_states}/Split-user_states/*.gz",
        recorded.user_state_dtypes(spec),
        settings.recomputed,
        _SEED,
    )
    catalogue = recorded.read_sample(
        f"{data.catalogue}/Split-catalogue/*.gz", recorded.catalogue_dtypes(spec), settings.recomputed, _SEED
    )
    on_step("recomputing features as of their events")
    past = KnownPast(
        interactions,
        users,
        items,
        spec,
        train_end_unix_s=summary.train_end_unix_s,
        max_positives_per_user=max_positives_per_user,
        user_ids=_ids([*few.values(), states], features.USER_ID),
        item_ids=_ids([*few.values(), catalogue], features.ITEM_ID),
    )
    checks = [
        check_recomputed(few, past),
        check_states(states, catalogue, past),
        check_strictly_before(few, past, spec),
        check_splits({split: found.keys for split, found in splits.items()}, interactions, spec),
    ]
    on_step("judging every feature alone")
    check, associations = check_associations(
        splits["train"].sample, splits["eval"].sample, spec, settings.max_auc
    )
    checks.append(check)
    on_step("recomputing vocabularies and quantiles")
    graph = tft.TFTransformOutput(str(data.transform_graph))
    rows = train_rows(interactions, users, items, summary.train_end_unix_s)
    checks += [check_vocabularies(graph, rows, spec), check_quantiles(graph, rows, spec)]
    inflation: tuple[Protocol, ...] = ()
    if settings.inflation:
        from tfx_pipeline.leakage.inflation import measure_inflation

        inflation = measure_inflation(
            interactions, items, spec, lambda name: on_step(f"cheap models: {name}")
        )
    return LeakageReport(spec.name, tuple(checks), associations, settings.max_auc, inflation)


def train_rows(
    interactions: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame, train_end_unix_s: int
) -> TrainRows:
    """The rows that the Transform graph may learn from, and the others."""
    table = join_as_of(interactions, users, features.USER_ID)
    table = join_as_of(table, items.drop(features.ITEM_COUNTS), features.ITEM_ID)
    is_train = pl.col("split") == "train"
    return TrainRows(table.filter(is_train), table.filter(~is_train), train_end_unix_s)


def _ids(samples: list[pl.DataFrame], name: str) -> list[str]:
    return pl.concat([sample[name].list.first() for sample in samples]).to_list()
