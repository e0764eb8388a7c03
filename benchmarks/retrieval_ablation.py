"""What each part of the retrieval model is worth: one setting changed at a time, the rest as in the run.

Each variant is trained on the examples of a finished run, exported, and judged through its ScaNN signature on
the users of `benchmarks.protocols.global_temporal`. Needs no extra.

Example, from the root of the repository:
  python -m benchmarks.retrieval_ablation --run-dir runs/movielens --out out/
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl

from benchmarks.comparison import USER_METRICS, judge
from benchmarks.protocols import EvaluationUsers, Tables, global_temporal, read_catalogue
from benchmarks.retraining import lists_of, retrained
from schema.tables import INTERACTIONS
from tfx_pipeline.run_result import RunResult, read_run
from trainer.config import RetrievalConfig
from trainer.features import SURFACE, feature_space


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the run.

    Attributes:
      overrides: settings of RetrievalConfig; nested mappings are merged.
      left_out: features that the towers do not read, beside those that the run ignores; a dataset need not
        have all of them.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    left_out: Sequence[str] = ()

    def applies_to(self, tables: Tables) -> bool:
        """Whether the dataset has a feature to leave out, and the surfaces to train on."""
        surfaces = self.overrides.get("surfaces")
        if surfaces and not (
            SURFACE in tables.interactions.columns and tables.interactions[SURFACE].is_in(surfaces).any()
        ):
            return False
        return not self.left_out or bool(self._known(tables))

    def settings(self, tables: Tables, config: RetrievalConfig) -> dict[str, Any]:
        """What `benchmarks.retraining.retrained` takes, given the settings of the run."""
        return {**self.overrides, "ignored_features": (*config.ignored_features, *self._known(tables))}

    def _known(self, tables: Tables) -> list[str]:
        names = {feature.name for feature in feature_space(tables.spec).all}
        return [name for name in self.left_out if name in names]


BASE = "as in the run"
# One line each; a setting that the run has already makes a variant equal to the base.
VARIANTS: Mapping[str, Variant] = {
    BASE: Variant(),
    "history up to the event": Variant({"roll_back_to_session": False}),
    "first sessions weigh 1": Variant({"first_session_weight": 1.0}),
    "no popularity of the day": Variant({"popularity_half_lives_days": ()}),
    "random item vectors": Variant({"item_vectors": "random"}),
    "item vectors from co-occurrence": Variant({"item_vectors": "cooccurrence"}),
    "no item factors": Variant({"factors": None}),
    "popularity of the day": Variant({"popularity_half_lives_days": (1.0, 7.0, 28.0)}),
    "in-batch negatives": Variant({"loss": {"uniform_negatives": 0}}),
    "1,000 uniform negatives": Variant({"loss": {"uniform_negatives": 1_000}}),
    "full softmax": Variant({"loss": {"uniform_negatives": "all"}}),
    "temperature .5": Variant({"loss": {"temperature": 0.5}}),
    "5 hard negatives": Variant({"loss": {"hard_negatives": 5}}),
    "streaming probabilities": Variant(
        {"loss": {"sampling_probability": "streaming", "uniform_negatives": 0}}
    ),
    "attention pooling": Variant({"history": {"encoder": "attention"}}),
    "transformer and gate": Variant({"history": {"encoder": "transformer"}}),
    "4 interests": Variant({"history": {"interests": 4}}),
    "embeddings 16 wide at most": Variant({"max_embedding_width": 16}),
    "new items boosted by 1": Variant({"new_item_boost": 1.0}),
    "no query dropout": Variant({"query_dropout_fraction": 0.0}),
    "no item id dropout": Variant({"item_id_dropout_fraction": 0.0}),
    # Of KuaiRand: the main feed, which nearly all recommendations are shown in.
    "watches of tab 1 only": Variant({"surfaces": ("1",)}),
    "watches of the home screen only": Variant({"surfaces": ("home",)}),
    "no history": Variant({"factors": None}, left_out=("history_item_ids",)),
    "no example age": Variant(left_out=("example_age_days",)),
    "no hour, no weekday": Variant(left_out=("hour_of_day", "day_of_week")),
    "no search words": Variant(left_out=("search_tokens",)),
    "no geography": Variant(left_out=("country", "user_language")),
    "no device": Variant(left_out=("device",)),
    "no demographics": Variant(left_out=("gender", "age", "age_bucket", "occupation")),
    "no creators, no words, no tags": Variant(
        left_out=("creator_id", "title_words", "topics", "genres", "tag")
    ),
}


def read_tables(run: RunResult) -> Tables:
    """The contract tables of a finished run."""
    folder = Path(run.tables_dir)
    return Tables(run.config.dataset, pl.read_parquet(folder / INTERACTIONS), read_catalogue(folder))


def measure(
    run_dir: Path,
    tables: Tables,
    users: Mapping[str, EvaluationUsers],
    overrides: Mapping[str, Any],
    seeds: Sequence[int],
) -> dict[str, dict[str, list[float]]]:
    """Metrics of a variant: split -> metric -> one mean over users per seed."""
    measured: dict[str, dict[str, list[float]]] = {name: {m: [] for m in USER_METRICS} for name in users}
    for seed in seeds:
        with retrained(run_dir, tables, {**overrides, "seed": seed}) as (model_dir, _):
            for name, asked in users.items():
                values = judge(lists_of(model_dir, run_dir, tables, asked.user_ids), asked.positives)
                for metric in USER_METRICS:
                    measured[name][metric].append(float(values[metric].mean()))
    return measured


def to_markdown(results: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    """One line per variant: validation and test, mean over seeds."""
    columns = [f"{split} {metric}" for split in ("validation", "test") for metric in USER_METRICS]
    lines = [f"| variant | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, splits in results.items():
        cells = [np.mean(splits[s][m]) for s in ("validation", "test") for m in USER_METRICS]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--run-dir", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--variant", "chosen", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
def main(run_dir: Path, seeds: int, chosen: Sequence[str], out: Path) -> None:
    """See the docstring of the module."""
    run = read_run(run_dir)
    tables = read_tables(run)
    protocol = global_temporal(tables)
    users = {"validation": protocol.validation, "test": protocol.test}
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in chosen or VARIANTS:
        variant = VARIANTS[name]
        if not variant.applies_to(tables):
            click.echo(f"{name}: not for {run.dataset}, which lacks the features or surfaces")
            continue
        settings = variant.settings(tables, run.config.retrieval)
        results[name] = measure(run_dir, tables, users, settings, range(seeds))
        shown = {m: f"{np.mean(v):.4f}" for m, v in results[name]["validation"].items()}
        tested = {m: f"{np.mean(v):.4f}" for m, v in results[name]["test"].items()}
        click.echo(f"{name}: validation {shown} test {tested}")
        partial = out / "ablation.partial"
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(out / f"ablation-{run.dataset}.json")
        (out / f"ablation-{run.dataset}.md").write_text(to_markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
