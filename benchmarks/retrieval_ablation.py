"""What each part of the retrieval model is worth: one setting changed at a time, the rest as in the run.

Each variant is trained on the examples of a finished run, exported, and judged through its ScaNN signature on
the users of `benchmarks.protocols.global_temporal`. Needs no extra.

Example, from the root of the repository:
  python -m benchmarks.retrieval_ablation --run-dir runs/movielens --data-dir data --out out/
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.comparison import USER_METRICS, judge
from benchmarks.protocols import EvaluationUsers, Tables, global_temporal, load_tables
from benchmarks.retraining import lists_of, retrained
from tfx_pipeline.run_result import read_run

BASE = "as in the run"
# One line each; a setting that the run has already makes a variant equal to the base.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    BASE: {},
    "history up to the event": {"roll_back_to_session": False},
    "first sessions weigh 1": {"first_session_weight": 1.0},
    "no popularity of the day": {"popularity_half_lives_days": ()},
    "random item vectors": {"item_vectors": "random"},
    "item vectors from co-occurrence": {"item_vectors": "cooccurrence"},
    "no item factors": {"factors": None},
    "popularity of the day": {"popularity_half_lives_days": (1.0, 7.0, 28.0)},
    "in-batch negatives": {"loss": {"uniform_negatives": 0}},
    "1,000 uniform negatives": {"loss": {"uniform_negatives": 1_000}},
    "full softmax": {"loss": {"uniform_negatives": "all"}},
    "5 hard negatives": {"loss": {"hard_negatives": 5}},
    "streaming probabilities": {"loss": {"sampling_probability": "streaming", "uniform_negatives": 0}},
    "attention pooling": {"history": {"encoder": "attention"}},
    "transformer and gate": {"history": {"encoder": "transformer"}},
    "4 interests": {"history": {"interests": 4}},
    "no query dropout": {"query_dropout_fraction": 0.0},
    "no item id dropout": {"item_id_dropout_fraction": 0.0},
    "no example age": {"ignored_features": ("example_age_days",)},
    "no hour, no weekday": {"ignored_features": ("hour_of_day", "day_of_week")},
    # Of KuaiRand: the main feed, which nearly all recommendations are shown in.
    "watches of tab 1 only": {"surfaces": ("1",)},
    "no history": {"ignored_features": ("history_item_ids",), "factors": None},
}


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
@click.option(
    "--data-dir", type=click.Path(exists=True, path_type=Path), help="The official archive's folder."
)
@click.option(
    "--work-dir", type=click.Path(path_type=Path), default=Path("runs/benchmarks"), show_default=True
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--variant", "chosen", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
def main(
    run_dir: Path, data_dir: Path | None, work_dir: Path, seeds: int, chosen: Sequence[str], out: Path
) -> None:
    """See the docstring of the module."""
    dataset = read_run(run_dir).dataset
    tables = load_tables(dataset, data_dir, work_dir)
    protocol = global_temporal(tables)
    users = {"validation": protocol.validation, "test": protocol.test}
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in chosen or VARIANTS:
        results[name] = measure(run_dir, tables, users, VARIANTS[name], range(seeds))
        shown = {m: f"{np.mean(v):.4f}" for m, v in results[name]["validation"].items()}
        tested = {m: f"{np.mean(v):.4f}" for m, v in results[name]["test"].items()}
        click.echo(f"{name}: validation {shown} test {tested}")
        partial = out / "ablation.partial"
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(out / f"ablation-{dataset}.json")
        (out / f"ablation-{dataset}.md").write_text(to_markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
