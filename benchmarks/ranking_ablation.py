"""What each part of the ranker is worth: one thing changed at a time, the rest as in the run.

Each variant is trained on the examples of a finished run, stopped early on its eval split, and judged on the
test split, whose rows know the events before them. Nothing is exported and no output calibrated. Variants
that need what the log does not have, such as positions, are left out unless they are named. A model of one
task alone still reads what became of earlier impressions in all tasks. Needs no extra.

Example, from the root of the repository:
  python -m benchmarks.ranking_ablation --run-dir runs/kuairand --json ablation.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec, TaskKind
from schema.errors import ConfigError, DataError
from tfx_pipeline.config import RunPaths
from tfx_pipeline.outcome import read_artifact_uris
from tfx_pipeline.retraining import merged
from tfx_pipeline.run_result import RunResult, read_run
from trainer import encoder, metrics, ranking
from trainer import features as ft
from trainer.config import RankingConfig
from trainer.input_pipeline import load_catalogue, ordered_batches, windows
from trainer.log_requirements import check_log
from trainer.ranking import judge, train
from trainer.row_weights import training_batches
from trainer.run_ranking import build, item_vectors, read_positions, read_statistics


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the run.

    Attributes:
      overrides: settings of RankingConfig; nested mappings are merged.
      hidden: transformed features that are 0 in every row, which means that nothing is known.
      hides_user_features: whether the declared features of users are hidden as well.
      has_powers: whether a continuous feature and a counter are read as x, x² and √x, or as x alone.
      only_task: the only task that is learnt; None for all.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hidden: Sequence[str] = ()
    hides_user_features: bool = False
    has_powers: bool = True
    only_task: str | None = None

    def hides(self, spec: DatasetSpec) -> tuple[str, ...]:
        """All transformed features that are 0 in every row.

        Raises:
          ConfigError: the dataset has no such features.
        """
        space = ft.feature_space(spec)
        users = [space.find(f.name) for f in spec.users.features] if self.hides_user_features else []
        if self.hides_user_features and not users:
            raise ConfigError(f"the dataset {spec.name!r} declares no features of users")
        known = {name for feature in space.all for name in feature.transformed_names}
        known |= {*ft.impression_names(spec), *ft.COUNTER_NAMES}
        for name in self.hidden:
            if name not in known:
                raise ConfigError(f"the dataset {spec.name!r} has no feature {name!r} to hide")
        return (*self.hidden, *(name for feature in users for name in feature.transformed_names))

    def learns(self, spec: DatasetSpec) -> DatasetSpec:
        """The declaration, in which every task that is not learnt has a loss that counts nothing.

        Raises:
          ConfigError: there is no task of this name.
        """
        if self.only_task is None:
            return spec
        if self.only_task not in {task.name for task in spec.tasks}:
            raise ConfigError(f"the dataset {spec.name!r} has no task {self.only_task!r}")
        tasks = [
            task if task.name == self.only_task else task.model_copy(update={"loss_weight": 0.0})
            for task in spec.tasks
        ]
        return spec.model_copy(update={"tasks": tuple(tasks)})


BASE = "as in the run"
# A setting that the run has already makes a variant equal to the base.
VARIANTS: Mapping[str, Variant] = {
    BASE: Variant(),
    "another seed": Variant({"seed": 1}),
    "without the user's impressions": Variant(hidden=(ft.IMPRESSION_IDS,)),
    "without the history of positives": Variant(hidden=(f"{ft.HISTORY}_ids",)),
    "without counters of the log": Variant(hidden=(ft.COUNTERS,)),
    "without features of users": Variant(hides_user_features=True),
    "without surface": Variant(hidden=(f"{ft.SURFACE}_id", ft.IMPRESSION_SURFACE_IDS)),
    "without hour of day": Variant(hidden=(f"{ft.HOUR_OF_DAY}_id",)),
    "without item age": Variant(hidden=(f"{ft.ITEM_AGE}_cdf", f"{ft.ITEM_AGE}_bucket")),
    "without x² and √x": Variant(has_powers=False),
    "without crosses of two features": Variant({"crosses": ()}),
    "without interactions": Variant({"interaction": {"kind": "none"}}),
    "without id dropout": Variant({"id_dropout_fraction": 0.0}),
    "with all ids": Variant({"ignored_features": ()}),
    "item vectors from co-occurrence": Variant({"item_vectors": "cooccurrence"}),
    "impressions by key and window": Variant({"past": {"key_windows": True}}),
    "churn": Variant({"past": {"churn": True}}),
    "impressions by context": Variant({"past": {"contexts": True}}),
    "DCN-v2 full, stacked": Variant({"interaction": {"kind": "dcn", "structure": "stacked"}}),
    "DCN-v2 full, parallel": Variant({"interaction": {"kind": "dcn", "structure": "parallel"}}),
    "DCN-v2 of rank 32, parallel": Variant(
        {"interaction": {"kind": "dcn_low_rank", "structure": "parallel"}}
    ),
    "DLRM, parallel": Variant({"interaction": {"kind": "dlrm", "structure": "parallel"}}),
    "MMoE": Variant({"experts": {"kind": "mmoe"}}),
    "PLE": Variant({"experts": {"kind": "ple"}}),
    "DIN": Variant({"behaviour": {"kind": "din"}}),
    "transformer": Variant({"behaviour": {"kind": "transformer"}}),
    "uncertainty weighting": Variant({"balancing": {"method": "uncertainty"}}),
    "GradNorm": Variant({"balancing": {"method": "gradnorm"}}),
    "position tower, additive": Variant({"position": {"kind": "additive"}}),
    "position tower, PAL": Variant({"position": {"kind": "pal"}}),
    "inverse propensities up to 30": Variant({"propensity_clip": 30.0}),
    "half of the negatives": Variant({"negative_rate": 0.5}),
    **{
        f"{task} alone": Variant(only_task=task)
        for task in ("click", "long_view", "like", "completion", "watch_time")
    },
}
Measured = dict[str, float]


class Ablation:
    """The examples of a run, read once, and what is trained on them."""

    def __init__(self, run: RunResult, paths: RunPaths, share: float) -> None:
        """Reads the examples.

        Args:
          run: the finished run.
          paths: its folders.
          share: of the training rows that every variant is trained on, the same ones.

        Raises:
          DataError: an artifact of the run is gone.
        """
        uris = read_artifact_uris(paths.metadata)
        examples = Path(uris["InteractionGen", "examples"])
        if not examples.is_dir():
            raise DataError(f"{examples} is gone; 'funnel run' with the same settings makes it again")
        self.spec, self.settings = run.config.dataset, run.config.ranking.model_dump()
        self.transform_output = tft.TFTransformOutput(str(uris["Transform", "transform_graph"]))
        items = [f"{uris['CatalogueGen', 'examples']}/Split-catalogue/*.gz"]
        self.catalogue = load_catalogue(items, self.transform_output, self.spec)
        self.windows = {
            split: windows([f"{examples}/Split-{split}/*.gz"], self.transform_output)
            for split in ("train", "eval", "test")
        }
        self.statistics = read_statistics(self.windows["train"], self.transform_output, self.spec)
        if share < 1:
            self.windows["train"] = _some_rows(self.windows["train"], share)

    def config(self, variant: Variant) -> RankingConfig:
        """The settings of a variant.

        Raises:
          ConfigError: it needs what the dataset does not have.
        """
        variant.hides(self.spec)
        variant.learns(self.spec)
        config = RankingConfig.model_validate(merged(self.settings, variant.overrides))
        check_log(config, self.spec)
        return config

    def measure(self, variant: Variant) -> Measured:
        """Trains a variant and judges it on the test split.

        Returns:
          `<task>/<metric>` of the tasks that are learnt; `cpu_s` of training, `epochs` until it stopped.

        Raises:
          ConfigError: as `config`.
        """
        config, spec, hidden = self.config(variant), variant.learns(self.spec), variant.hides(self.spec)
        data = {split: _without(window, hidden) for split, window in self.windows.items()}
        tf.keras.utils.set_random_seed(config.seed)
        source = (self.windows["train"], self.transform_output, spec, config)
        positions, vectors = read_positions(*source), item_vectors(*source)
        with contextlib.nullcontext() if variant.has_powers else _no_powers():
            model = build(
                spec, self.transform_output, self.catalogue, self.statistics, config, positions, vectors
            )
            batches = training_batches(data["train"], spec, config)
            start = time.process_time()
            log = train(model, batches, ordered_batches(data["eval"], config.batch_size), config)
            measured: Measured = {"cpu_s": time.process_time() - start, "epochs": float(len(log))}
            judged = judge(model, ordered_batches(data["test"], config.batch_size))
        for task in (task for task in spec.tasks if task.loss_weight > 0):
            label, output = judged.labels[task.label], judged.outputs[task.name]
            known = ~np.isnan(label)
            truth, served = label[known].astype(np.float64), output[known].astype(np.float64)
            if task.kind is TaskKind.BINARY:
                measured[f"{task.name}/auc"] = metrics.auc(truth, served)
            else:
                measured[f"{task.name}/xauc"] = metrics.xauc(truth, served)
                measured[f"{task.name}/mae"] = metrics.mae(truth, served)
        return measured


@contextlib.contextmanager
def _no_powers() -> Iterator[None]:
    """Has models that are built and traced inside read x where x, x² and √x are read otherwise."""

    def alone(x: tf.Tensor) -> tf.Tensor:
        return x

    with mock.patch.object(encoder, "with_powers", alone), mock.patch.object(ranking, "with_powers", alone):
        yield


def able(ablation: Ablation) -> list[str]:
    """The variants that the log has what they need for; tells which are left out."""
    names = []
    for name, variant in VARIANTS.items():
        try:
            ablation.config(variant)
        except ConfigError as error:
            click.echo(f"{name}: left out, {error}")
        else:
            names.append(name)
    return names


def _some_rows(data: tf.data.Dataset, share: float) -> tf.data.Dataset:
    def some(window: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        count = tf.shape(next(iter(window.values())))[:1]
        is_kept = tf.random.stateless_uniform(count, seed=(0, 0)) < share
        return {name: tf.boolean_mask(column, is_kept) for name, column in window.items()}

    return data.map(some).cache()


def _without(data: tf.data.Dataset, hidden: Sequence[str]) -> tf.data.Dataset:
    if not hidden:
        return data
    return data.map(
        lambda window: {**window, **{name: tf.zeros_like(window[name]) for name in hidden}}
    ).cache()


def to_markdown(results: Mapping[str, Measured]) -> str:
    """One line per variant, with the difference to the base behind each metric but those of time.

    A cell is empty where the variant learns no such task.
    """
    base = results.get(BASE)
    columns = list(dict.fromkeys(column for measured in results.values() for column in measured))
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, measured in results.items():
        cells = []
        for column in columns:
            if column not in measured:
                cells.append("")
                continue
            digits = 0 if column in ("cpu_s", "epochs") else 2 if column.endswith("/mae") else 4
            cell = f"{measured[column]:.{digits}f}"
            if digits and base is not None and measured is not base:
                cell += f" ({measured[column] - base[column]:+.{digits}f})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--run-dir", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--variant", "chosen", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Every number; added to if there.")
def main(run_dir: Path, share: float, chosen: Sequence[str], json_path: Path | None) -> None:
    """See the docstring of the module."""
    ablation = Ablation(read_run(run_dir), RunPaths(run_dir), share)
    results: dict[str, Measured] = {}
    if json_path is not None and json_path.is_file():
        results = json.loads(json_path.read_text(encoding="utf-8"))
    for name in chosen or able(ablation):
        results[name] = ablation.measure(VARIANTS[name])
        click.echo(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in results[name].items()))
        if json_path is not None:
            json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    click.echo(to_markdown(results))


if __name__ == "__main__":
    main()
