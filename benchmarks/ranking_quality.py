"""Ranking quality of the exported model against simple baselines, on the same test rows and information.

Every model is judged twice. With frozen history nothing after the end of training is known; with online
history every row knows the events before it, those of the test split too. Baselines are fitted on the train
split and tuned on the eval split. The model is judged by the predictions of its signature
`serving_examples`, as `funnel batch-score` writes them, of the pushed model or of models trained again with
other seeds. Needs the extra `benchmarks`.

Example, from the root of the repository:
  python -m benchmarks.ranking_quality --dataset kuairand-pure --run-dir runs/seed0 --json out/ranking.json
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import Progress
from scipy.special import expit, logit

from benchmarks.protocols import prepare_dataset, read_run_on
from benchmarks.ranking_baselines import BASELINES, Fitted, Predict, RankingData, tune
from benchmarks.retraining import retrained_ranker
from benchmarks.seeds import mean_and_std
from schema.contract import TaskKind, TaskSpec
from schema.errors import DataError, FunnelError
from schema.point_in_time import ITEM_COUNTS
from schema.tables import INTERACTIONS, IS_REPEATED, ITEMS, USERS, InteractionRows, read_summary
from tfx_pipeline.batch_score import batch_score
from tfx_pipeline.config import RunPaths
from tfx_pipeline.datasets.archives import ARCHIVES
from trainer import metrics
from trainer.metrics import RANKING_METRICS
from trainer.ranking_features import FloatArray, History, RankingTables, ranking_features
from trainer.uncertainty import UserSums, paired_differences, ranking_sums

OURS = "Funnel"
ROW_NUMBER = "row_number"
# The metrics that differences are given of.
COMPARED = {True: ("auc", "gauc"), False: ("mae", "xauc")}
BLENDED = "LightGBM"
# Weights of the online past of the user in a blend of logits; below 0 turns against it.
LAMBDAS = (-0.6, -0.3, 0.0, 0.3, 0.6, 1.0, 1.2)
# Margin of a probability from 0 and 1 whose logit is taken.
_PROBABILITY_MARGIN = 1e-6

# Measured before this benchmark on 43,268 rows of KuaiRand-Pure: those whose column `date` lies in the test
# window, exact duplicates included. Target encodings of strictly earlier days of training, one seed.
ANCHORS: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]] = {
    "kuairand-pure": {
        "click": {
            "item mean": {"auc": 0.667, "gauc": 0.614},
            "logistic regression": {"auc": 0.7375, "gauc": 0.6472},
            "LightGBM": {"auc": 0.7402, "gauc": 0.6411},
            "plain shared-bottom DNN": {"auc": 0.7294, "gauc": 0.6382},
        },
        "like": {
            "item mean": {"auc": 0.677},
            "logistic regression": {"auc": 0.843},
            "LightGBM": {"auc": 0.8468},
            "plain shared-bottom DNN": {"auc": 0.816},
        },
        "long_view": {
            "item mean": {"auc": 0.675, "gauc": 0.626},
            "logistic regression": {"auc": 0.7356, "gauc": 0.6548},
            "LightGBM": {"auc": 0.7385, "gauc": 0.6516},
            "plain shared-bottom DNN": {"auc": 0.7225, "gauc": 0.6460},
        },
        "watch_time": {
            "item mean": {"mae": 19.81, "xauc": 0.5},
            "logistic regression": {"mae": 18.68, "xauc": 0.6878},
            "LightGBM": {"mae": 18.37, "xauc": 0.6877},
            "plain shared-bottom DNN": {"mae": 18.64, "xauc": 0.6819},
        },
    }
}

# A model of ours, to be asked with a history: predictions of rows, see `check_predictions`.
Asked = Callable[[History], pl.DataFrame]


def load_ranking_tables(dataset: str, data_dir: Path | None, work_dir: Path) -> RankingTables:
    """Prepares an official dataset and reads its contract tables.

    Args, Raises: as `benchmarks.protocols.prepare_dataset`.
    """
    spec, folder = prepare_dataset(dataset, data_dir, work_dir)
    interactions, items, users = (pl.read_parquet(folder / name) for name in (INTERACTIONS, ITEMS, USERS))
    return RankingTables(spec, interactions, items, users, read_summary(folder).train_end_unix_s)


def exported_predictions(
    run_dir: Path, tables: RankingTables, history: History, model_dir: Path | None = None
) -> pl.DataFrame:
    """What an exported ranker predicts for the test rows.

    Args:
      run_dir: output directory of a finished `funnel run` on the same data.
      tables: of the benchmark.
      history: how far the log reaches.
      model_dir: SavedModel of a ranker trained on the examples of the run; None for the pushed one.

    Returns:
      `row_number` of the contract table, and float32 per task, one row per test row.

    Raises:
      DataError: the run is of another dataset or split.
      ServingError: there is no such model.
    """
    run = read_run_on(tables.spec, run_dir)
    # With online history the outcomes of the eval split are known too.
    splits = ("test",) if history is History.FROZEN else ("eval", "test")
    asked = tables.interactions.filter(pl.col("split").is_in(splits))
    rows = asked.drop("split", ITEM_COUNTS, strict=False).with_columns(
        pl.int_range(pl.len(), dtype=pl.Int64).alias(ROW_NUMBER), pl.lit(False).alias(IS_REPEATED)
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "predictions.parquet"
        online = history is History.ONLINE
        batch_score(
            run, RunPaths(run_dir), InteractionRows(rows, ()), out, online, model_dir, lambda done: None
        )
        answers = pl.read_parquet(out, columns=[task.name for task in tables.spec.tasks])
    answers = answers.with_columns(asked[ROW_NUMBER], asked["split"])
    return answers.filter(pl.col("split") == "test").drop("split")


def check_predictions(predictions: pl.DataFrame, tables: RankingTables) -> dict[str, FloatArray]:
    """Predictions by task in the order of the test rows of the tables.

    Args:
      predictions: `row_number` and a column per task, in any order.
      tables: of the benchmark.

    Returns:
      Task name -> float64 [test rows].

    Raises:
      DataError: a test row has no prediction or several, or one that is not finite; there are other rows.
    """
    rows = tables.interactions.filter(pl.col("split") == "test")[ROW_NUMBER]
    given = predictions[ROW_NUMBER]
    if len(given) != len(rows) or given.n_unique() != len(rows) or not given.is_in(rows.implode()).all():
        raise DataError(
            f"predictions of {given.n_unique():,} rows ({len(given):,} in all) for {len(rows):,} test rows; "
            "expected each test row once: score the test split of the run's own tables"
        )
    joined = rows.to_frame().join(predictions, on=ROW_NUMBER, how="left", maintain_order="left")
    found = {task.name: joined[task.name].cast(pl.Float64).to_numpy() for task in tables.spec.tasks}
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise DataError(f"{np.sum(~np.isfinite(values)):,} predictions of task {name} are not finite")
    return found


def our_predictions(
    run_dirs: Sequence[Path], tables: RankingTables, retrained_seeds: int, progress: Progress
) -> dict[History, list[dict[str, FloatArray]]]:
    """Predictions of the rankers of some runs, or of models trained again, by history.

    Args:
      run_dirs: finished runs on the same data.
      tables: of the benchmark.
      retrained_seeds: above 0, each run is trained again with so many seeds, and these are judged.
      progress: shows what is being asked.
    """
    found: dict[History, list[dict[str, FloatArray]]] = {history: [] for history in History}
    for run_dir in run_dirs:
        task = progress.add_task(f"asking {run_dir.name}", total=max(1, retrained_seeds))
        for seed in range(max(1, retrained_seeds)):
            with _model(run_dir, tables, seed if retrained_seeds else None) as model_dir:
                for history in History:
                    predictions = exported_predictions(run_dir, tables, history, model_dir)
                    found[history].append(check_predictions(predictions, tables))
            progress.advance(task)
    return found


@contextlib.contextmanager
def _model(run_dir: Path, tables: RankingTables, seed: int | None) -> Iterator[Path | None]:
    if seed is None:
        yield None
    else:
        with retrained_ranker(run_dir, tables.spec, {"seed": seed}) as model_dir:
            yield model_dir


def judge(
    task: TaskSpec,
    labels: FloatArray,
    user_ids: np.ndarray,
    predictions: Mapping[str, Sequence[FloatArray]],
    num_samples: int,
) -> dict[str, Any]:
    """Figures of all models on the same rows, and ours against each of the others.

    Args:
      task: what is predicted.
      labels: float64 [m].
      user_ids: [m].
      predictions: model -> one array per seed, float64 [m].
      num_samples: resamples of users that an interval is taken from.

    Returns:
      `models`: model -> metric -> `mean` and `std` over seeds, None for one seed; with our model,
      `ours_minus`: model -> metric -> `difference`, `low`, `high`.
    """
    figures: dict[str, Any] = {"models": {}}
    for name, by_seed in predictions.items():
        values = [metrics.ranking_metrics(task.kind, labels, p, user_ids) for p in by_seed]
        figures["models"][name] = {
            metric: mean_and_std([v[metric] for v in values])
            for metric in RANKING_METRICS[task.kind]
            # It takes clicks besides labels; the comparison of a run has it.
            if metric != "weighted_pairwise_loss"
        }
    if OURS in predictions:
        compared = COMPARED[task.kind is TaskKind.BINARY]
        sums = {
            name: _over_seeds([ranking_sums(task.kind, labels, p, user_ids) for p in by_seed], compared)
            for name, by_seed in predictions.items()
        }
        figures["ours_minus"] = {
            name: {
                metric: {"difference": change.value, "low": change.low, "high": change.high}
                for metric, change in paired_differences(
                    sums[OURS], sums[name], num_resamples=num_samples
                ).items()
            }
            for name in predictions
            if name != OURS
        }
    return figures


def _over_seeds(
    by_seed: Sequence[Mapping[str, UserSums]], metric_names: Sequence[str]
) -> dict[str, UserSums]:
    """The mean of a metric over seeds, as one metric."""

    def mean_of(seeds: Sequence[UserSums]) -> UserSums:
        width = seeds[0].sums.shape[1]

        def combine(sums: FloatArray) -> FloatArray:
            parts = (sums[..., i * width : (i + 1) * width] for i in range(len(seeds)))
            return np.mean([seed.combine(part) for seed, part in zip(seeds, parts, strict=True)], axis=0)

        return UserSums(np.concatenate([seed.sums for seed in seeds], axis=1), combine)

    return {name: mean_of([sums[name] for sums in by_seed]) for name in metric_names}


def online_past_trade_off(data: RankingData, task: TaskSpec, model: Predict) -> list[dict[str, float]]:
    """AUC and GAUC when a model follows the user's past up to the event by part, or turns against it.

    The logit is (1 − λ) · logit with the user's past frozen + λ · logit with everything online; the counters
    of the items are online in both. λ = 1 is the model itself.

    Why GAUC falls while AUC rises: docs/ranking.md.

    Args:
      data: with both histories.
      task: binary.
      model: for online history.

    Returns:
      `lambda`, `auc` and `gauc` for each of LAMBDAS.
    """
    rows = data.rows(task, "test")
    labels, users = data.labels(task, rows), data.tables.interactions["user_id"].to_numpy()[rows]
    online = data.features[History.ONLINE]
    without = online.with_columns_of(data.features[History.FROZEN], online.of_user)
    with_past, without_past = (
        logit(np.clip(model(features, rows), _PROBABILITY_MARGIN, 1 - _PROBABILITY_MARGIN))
        for features in (online, without)
    )
    curve = []
    for weight in LAMBDAS:
        blended = expit((1 - weight) * without_past + weight * with_past)
        curve.append(
            {
                "lambda": weight,
                "auc": metrics.auc(labels, blended),
                "gauc": metrics.gauc(labels, blended, users),
            }
        )
    return curve


def benchmark(
    data: RankingData,
    ours: Mapping[History, Sequence[Mapping[str, FloatArray]]],
    seeds: int,
    num_samples: int,
    progress: Progress,
) -> dict[str, Any]:
    """All figures of one dataset, ready for JSON.

    Args:
      data: the dataset.
      ours: for each history, the predictions of each of our models by task, see `check_predictions`; none
        judges the baselines alone.
      seeds: fits of the baselines that depend on a seed.
      num_samples: resamples of users that an interval is taken from.
      progress: shows what is being fitted.
    """
    tables = data.tables
    figures: dict[str, Any] = {
        "dataset": tables.spec.name,
        "rows": {split: int(tables.of_split(split).sum()) for split in ("train", "eval", "test")},
        "parameters": {},
        "test": {history.value: {} for history in data.features},
        "online_past": {},
    }
    users = tables.interactions["user_id"].to_numpy()
    in_test = tables.of_split("test")
    for task in tables.spec.tasks:
        fitted = _fit_all(data, task, seeds, progress)
        rows = data.rows(task, "test")
        figures["parameters"][task.name] = {
            name: {history.value: dict(chosen.parameters) for history, chosen in by_history.items()}
            for name, by_history in fitted.items()
        }
        for history, features in data.features.items():
            predictions = {
                name: [model(features, rows) for model in by_history[history].models]
                for name, by_history in fitted.items()
            }
            if ours.get(history):
                predictions[OURS] = [by_task[task.name][rows[in_test]] for by_task in ours[history]]
            figures["test"][history.value][task.name] = judge(
                task, data.labels(task, rows), users[rows], predictions, num_samples
            )
        if task.kind is TaskKind.BINARY:
            model = fitted[BLENDED][History.ONLINE].models[0]
            figures["online_past"][task.name] = online_past_trade_off(data, task, model)
    figures["seeds"] = {"baselines": seeds, OURS: len(next(iter(ours.values()), ()))}
    return figures


def _fit_all(
    data: RankingData, task: TaskSpec, seeds: int, progress: Progress
) -> dict[str, dict[History, Fitted]]:
    fitted = {}
    for name, baseline in BASELINES.items():
        if task.kind in baseline.kinds:
            shown = progress.add_task(f"{task.name}: tuning {name}", total=len(list(baseline.choices())))
            fitted[name] = tune(baseline, data, task, seeds, lambda shown=shown: progress.advance(shown))
    return fitted


def to_markdown(figures: Mapping[str, Any]) -> str:
    """The report of one dataset."""
    rows = figures["rows"]
    lines = [
        f"# Ranking quality on {figures['dataset']}",
        "",
        f"{rows['train']:,} training rows, {rows['eval']:,} to tune on, {rows['test']:,} test rows. "
        "± is the standard deviation over seeds. GAUC: users with both classes, weighted by their rows. "
        "Lower is better for log loss, ECE and MAE.",
    ]
    for history, by_task in figures["test"].items():
        for task, part in by_task.items():
            lines += ["", f"## {task}, {history} history", ""]
            anchors = ANCHORS.get(figures["dataset"], {}).get(task, {})
            lines += _figures_table(part["models"], anchors if history == History.FROZEN.value else {})
            if "ours_minus" in part:
                lines += ["", "Ours minus theirs, 95 % interval (paired bootstrap over users):", ""]
                lines += _differences_table(part["ours_minus"])
    lines += [
        "",
        "## What online history does to GAUC",
        "",
        f"{BLENDED}, (1 − λ) · logit with the user's past frozen + λ · logit with it online. AUC rises with "
        "λ and GAUC falls, for any model that follows the user's own rate: see docs/ranking.md.",
        "",
        "| λ | " + " | ".join(f"{t} AUC | {t} GAUC" for t in figures["online_past"]) + " |",
        "| ---: |" + " ---: |" * (2 * len(figures["online_past"])),
    ]
    for points in zip(*figures["online_past"].values(), strict=True):
        cells = " | ".join(f"{point['auc']:.4f} | {point['gauc']:.4f}" for point in points)
        lines.append(f"| {points[0]['lambda']:g} | {cells} |")
    return "\n".join(lines) + "\n"


def _figures_table(
    models: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    anchors: Mapping[str, Mapping[str, float]],
) -> list[str]:
    names = list(next(iter(models.values())))
    lines = [f"| model | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for model, values in models.items():
        cells = (values[name] for name in names)
        texts = (
            f"{cell['mean']:.4f}" if cell["std"] is None else f"{cell['mean']:.4f} ± {cell['std']:.4f}"
            for cell in cells
        )
        lines.append(f"| {model} | {' | '.join(texts)} |")
    for model, anchor in anchors.items():
        texts = (f"{anchor[name]:g}" if name in anchor else "" for name in names)
        lines.append(f"| anchor, other rows: {model} | {' | '.join(texts)} |")
    return lines


def _differences_table(rivals: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    names = list(next(iter(rivals.values())))
    lines = [f"| model | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for model, values in rivals.items():
        texts = (
            f"{values[n]['difference']:+.4f} [{values[n]['low']:+.4f}, {values[n]['high']:+.4f}]"
            for n in names
        )
        lines.append(f"| {model} | {' | '.join(texts)} |")
    return lines


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: undefined metrics become null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@click.command(help=__doc__)
@click.option("--dataset", type=click.Choice(sorted(ARCHIVES)), required=True)
@click.option(
    "--data-dir",
    type=click.Path(exists=True, path_type=Path),
    help="The archive, or a folder that holds it; left out, it is downloaded.",
)
@click.option(
    "--run-dir",
    "run_dirs",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Output directory of a finished 'funnel run'; repeat it, one per seed. None: the baselines alone.",
)
@click.option(
    "--retrained-seeds",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Train the ranker of each run again with so many seeds, on its examples, and judge these.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Fits of seeded baselines."
)
@click.option("--bootstrap-samples", type=click.IntRange(100), default=1_000, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of LightGBM.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=Path("runs/benchmarks"),
    show_default=True,
    help="Unpacked files and tables go there, and are reused.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(
    dataset: str,
    data_dir: Path | None,
    run_dirs: tuple[Path, ...],
    retrained_seeds: int,
    seeds: int,
    bootstrap_samples: int,
    threads: int,
    work_dir: Path,
    json_path: Path | None,
) -> None:
    """Prints the report; see the docstring of the module."""
    try:
        with Progress(console=Console(stderr=True)) as progress:
            tables = load_ranking_tables(dataset, data_dir, work_dir)
            ours = our_predictions(run_dirs, tables, retrained_seeds, progress)
            data = RankingData(
                tables, {history: ranking_features(tables, history) for history in History}, threads
            )
            figures = benchmark(data, ours, seeds, bootstrap_samples, progress)
    except FunnelError as error:
        raise click.ClickException(str(error)) from error
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(_without_nan(figures), indent=1) + "\n", encoding="utf-8")
    click.echo(to_markdown(figures))


if __name__ == "__main__":
    main()
