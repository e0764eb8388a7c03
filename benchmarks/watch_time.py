"""Methods for watch time, compared on the same rows, features and small network.

Every method of a watch_time task is trained on the train split, stopped by its own loss on the eval split,
and judged on the test split of the contract tables. On the simulated data the true expected watch time of
each impression is known, and errors against it are added. Then table 2 of Covington et al. (RecSys 2016,
doi:10.1145/2959100.2959190): hidden layers, with clicks weighted by watch time and equally.

Features: ids of user, item, creator and surface; duration; hour; position where the log has one, on which the
truth of the simulation depends; and for user, item and creator the number of impressions and the means of
click, log watch time and share watched on earlier days of the train split.

Example:
  python -m benchmarks.watch_time --dataset kuairand-pure --data-dir data --json out/watch_time.json
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import matplotlib
import numpy as np
import numpy.typing as npt
import polars as pl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.protocols import Tables, load_tables
from benchmarks.seeds import mean_and_std, summary
from schema.contract import COMPLETION, WATCH_TIME, TaskKind, TaskSpec, load_dataset_spec
from schema.tables import INTERACTIONS, ITEMS, prepare_tables
from tfx_pipeline.datasets.simulator import DEFAULT, simulate
from trainer import features as ft
from trainer import metrics
from trainer.label_statistics import bucket_name, label_statistics
from trainer.ranking_losses import Objective, labelled_loss, objective
from trainer.watch_time import CovingtonLogistic, TaskContext, task_context

import tensorflow as tf  # isort: skip  (after trainer, which chooses the Keras generation)

FloatArray = npt.NDArray[np.floating[Any]]

DATASETS = ("simulated", "kuairand-pure")
DURATION = "duration_s"
BUCKET = bucket_name(DURATION)
CLICK = "click"
_SECONDS_PER_DAY = 86_400
# Impressions at which the mean of a user or an item counts as much as that of everybody.
_PRIOR_ROWS = 20
_ID_WIDTHS = {"user_id": 8, "item_id": 8, "creator_id": 8, "surface": 4, "position": 4, BUCKET: 8}
_NUM_DECILES = 10

HIDDEN_LAYERS = (128, 64)
BATCH_SIZE = 1024
MAX_EPOCHS = 12
PATIENCE_EPOCHS = 2
LEARNING_RATE = 1e-3
DROPOUT_FRACTION = 0.1

_WATCH = {"name": "watch_time", "label": WATCH_TIME, "kind": TaskKind.WATCH_TIME}
_COVINGTON = {"method": "covington_logistic", "click_label": CLICK}
_BY_DURATION = {"duration_feature": DURATION}
# Further fields of the task; in the paper's own form the served value is not corrected for the click rate.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "weighted logistic": {},
    "Covington, as in the paper": _COVINGTON,
    "Covington, corrected": _COVINGTON,
    "duration quantiles, mean rank": {"method": "duration_quantiles", **_BY_DURATION},
    "duration quantiles, median": {"method": "duration_quantiles", "serve": "median", **_BY_DURATION},
    "ordinal, mean": {"method": "ordinal"},
    "ordinal, median": {"method": "ordinal", "serve": "median"},
    "ordinal by duration, mean": {"method": "ordinal", **_BY_DURATION},
    "ordinal by duration, median": {"method": "ordinal", "serve": "median", **_BY_DURATION},
    "ordinal by duration, middle": {"method": "ordinal", "serve": "trimmed_mean", **_BY_DURATION},
    "regression, mean": {"method": "regression"},
    "regression, median": {"method": "regression", "serve": "median"},
    "log regression": {"method": "log_regression"},
}
UNCORRECTED = "Covington, as in the paper"
CONSTANTS: Mapping[str, Callable[[FloatArray], np.floating[Any]]] = {
    "global mean": np.mean,
    "global median": np.median,
}
TABLE_2_LAYERS = ((), (512, 256), (1024, 512, 256))


@dataclasses.dataclass(frozen=True)
class WatchLog:
    """The impressions of one split that have a watch time, in time order.

    Attributes:
      columns: labels float32 [n], ids and duration bucket int32 [n], 0 for unknown, all by name.
      dense: float32 [n, D].
      user_ids: [n].
      duration_s: float64 [n], NaN where unknown.
      truth_s: float64 [n], true expected watch time; None for a real log.
    """

    columns: Mapping[str, npt.NDArray]
    dense: npt.NDArray[np.float32]
    user_ids: npt.NDArray
    duration_s: npt.NDArray[np.float64]
    truth_s: npt.NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.dense)

    @property
    def watch_time_s(self) -> npt.NDArray[np.float64]:
        """The label, float64 [n]."""
        return self.columns[WATCH_TIME].astype(np.float64)


def load(
    dataset: str, data_dir: Path | None, work_dir: Path
) -> tuple[Tables, npt.NDArray[np.float64] | None]:
    """Prepares the tables of a dataset; what is in `work_dir` is reused.

    Returns:
      The tables, and on simulated data the true expected watch time of each interaction.
    """
    if dataset != "simulated":
        return load_tables(dataset, data_dir, work_dir), None
    source = work_dir / "source" / dataset
    if not source.is_dir():
        simulate(DEFAULT, source)
    spec = load_dataset_spec(dataset)
    folder = prepare_tables(spec, source, work_dir / "data" / dataset)
    tables = Tables(spec, pl.read_parquet(folder / INTERACTIONS), pl.read_parquet(folder / ITEMS))
    truth = pl.read_parquet(source / "truth" / "impressions.parquet")["expected_watch_time_s"].to_numpy()
    return tables, truth[tables.interactions["row_number"].to_numpy()]


def build_logs(tables: Tables, truth_s: npt.NDArray[np.float64] | None) -> dict[str, WatchLog]:
    """The feature matrix of every split.

    Args:
      tables: with watch time, click, and the item feature `duration_s`.
      truth_s: [n] as `load` returns it.
    """
    optional = [name for name in ("creator_id",) if name in tables.items.columns]
    frame = tables.interactions.join(
        tables.items.select("item_id", DURATION, *optional), on="item_id", how="left", maintain_order="left"
    )
    local_s = pl.col("event_time_unix_s") + int(tables.spec.utc_offset_hours * 3_600)
    frame = frame.with_columns(day=local_s // _SECONDS_PER_DAY, hour=local_s // 3_600 % 24)
    if truth_s is not None:
        frame = frame.with_columns(truth_s=pl.Series(truth_s))
    frame = frame.drop_nulls([WATCH_TIME, CLICK])
    in_train = (frame["split"] == "train").to_numpy()

    duration = frame[DURATION].cast(pl.Float64).fill_null(np.nan).to_numpy()
    columns = {name: frame[name].to_numpy() for name in (WATCH_TIME, CLICK)}
    columns[BUCKET] = quantile_buckets(duration, in_train)
    for name in _ID_WIDTHS:
        if name in frame.columns:
            columns[name] = _codes(frame[name], in_train)
    hour = frame["hour"].to_numpy() * (2 * np.pi / 24)
    means = [
        earlier_means(frame, key) for key in ("user_id", "item_id", "creator_id") if key in frame.columns
    ]
    dense = np.column_stack([np.log(np.nan_to_num(duration) + 1), np.sin(hour), np.cos(hour), *means])
    spread = dense[in_train].std(axis=0)
    # A column that never changes in training has nothing to say; rounding leaves it a spread of about 1e-16.
    dense = np.where(spread > 1e-9, (dense - dense[in_train].mean(axis=0)) / np.maximum(spread, 1e-9), 0.0)
    truth = frame["truth_s"].to_numpy() if truth_s is not None else None
    users, split = frame["user_id"].to_numpy(), frame["split"].to_numpy()
    return {
        name: WatchLog(
            {key: values[split == name] for key, values in columns.items()},
            dense[split == name].astype(np.float32),
            users[split == name],
            duration[split == name],
            None if truth is None else truth[split == name],
        )
        for name in ft.SPLITS
    }


def quantile_buckets(values: FloatArray, in_train: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Buckets as in the Transform graph: 1 to NUM_BUCKETS by quantiles of the train rows, 0 for NaN."""
    known = ~np.isnan(values)
    levels = np.arange(1, ft.NUM_BUCKETS) / ft.NUM_BUCKETS
    boundaries = np.quantile(values[in_train & known], levels)
    return np.where(known, 1 + np.searchsorted(boundaries, values, side="right"), 0).astype(np.int32)


def _codes(values: pl.Series, in_train: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """1, 2, ... for the values of the train rows, 0 for missing and unknown ones."""
    known = values.filter(pl.Series(in_train)).drop_nulls().unique(maintain_order=True)
    codes = pl.DataFrame({"value": known, "code": np.arange(1, len(known) + 1, dtype=np.int32)})
    joined = pl.DataFrame({"value": values}).join(codes, on="value", how="left", maintain_order="left")
    return joined["code"].fill_null(0).to_numpy()


def earlier_means(frame: pl.DataFrame, key: str) -> FloatArray:
    """What the train split knew of each row's user or item the evening before.

    Returns:
      float64 [n, 4]: log(1 + impressions), and the means of click, log watch time and share watched, shrunk
      towards those of all train rows.
    """
    values = {
        "clicked": pl.col(CLICK).cast(pl.Float64),
        "log_watch": (pl.col(WATCH_TIME).cast(pl.Float64) + 1).log(),
        "share": pl.col(COMPLETION).cast(pl.Float64),
    }
    train = frame.filter(pl.col("split") == "train").select(key, "day", **values)
    prior = train.select(pl.col(list(values)).mean()).row(0)
    train = train.with_columns(pl.col(name).fill_null(mean) for name, mean in zip(values, prior, strict=True))
    by_day = train.group_by(key, "day").agg(pl.len().alias("rows"), pl.col(list(values)).sum()).sort("day")
    totals = by_day.with_columns(pl.col("rows", *values).cum_sum().over(key))
    rows = frame.select(key, "day").with_row_index("row").sort("day")
    joined = rows.join_asof(
        totals, on="day", by=key, strategy="backward", allow_exact_matches=False, check_sortedness=False
    )
    joined = joined.sort("row").select("rows", *values).fill_null(0)
    count = joined["rows"].to_numpy().astype(np.float64)
    shrunk = [
        (joined[name].to_numpy() + _PRIOR_ROWS * mean) / (count + _PRIOR_ROWS)
        for name, mean in zip(values, prior, strict=True)
    ]
    return np.column_stack([np.log1p(count), *shrunk])


class SmallNetwork(tf.keras.Model):
    """Embeddings and dense features, some hidden layers, one head."""

    def __init__(self, log: WatchLog, hidden_layers: Sequence[int], task: Objective) -> None:
        """Makes an untrained network for the columns of the train log."""
        super().__init__()
        self.embeddings = {
            name: tf.keras.layers.Embedding(int(log.columns[name].max()) + 1, width)
            for name, width in _ID_WIDTHS.items()
            if name in log.columns
        }
        self.hidden = [tf.keras.layers.Dense(width, activation="relu") for width in hidden_layers]
        self.dropout = tf.keras.layers.Dropout(DROPOUT_FRACTION)
        self.head = tf.keras.layers.Dense(
            task.num_logits,
            kernel_initializer="zeros",
            bias_initializer=tf.keras.initializers.Constant(task.initial_bias),
        )

    def call(self, rows: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Logits, float32 [B, n]; in training, ids read as unknown at random, so that 0 is learnt."""
        parts = [rows["dense"]]
        for name, table in self.embeddings.items():
            ids = rows[name]
            if training:
                ids = tf.where(tf.random.uniform(tf.shape(ids)) < DROPOUT_FRACTION, 0, ids)
            parts.append(table(ids))
        x = tf.concat(parts, axis=1)
        for layer in self.hidden:
            x = layer(self.dropout(x, training=training))
        return self.head(x)


def fit(
    logs: Mapping[str, WatchLog], task: TaskSpec, hidden_layers: Sequence[int], seed: int
) -> tuple[Objective, tf.Tensor, TaskContext]:
    """Trains the network on one task and asks it about the test split.

    Returns:
      The objective, logits float32 [n, num_logits] and the context of the test rows.
    """
    tf.keras.utils.set_random_seed(seed)
    statistics = label_statistics([logs["train"].columns], [task])[task.name]
    task_objective = objective(task, statistics)
    network = SmallNetwork(logs["train"], hidden_layers, task_objective)
    optimizer = tf.keras.optimizers.Adam(LEARNING_RATE)
    data = {name: _tensors(log) for name, log in logs.items()}

    def loss_of(rows: Mapping[str, tf.Tensor], training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        logits = network(rows, training=training)
        return labelled_loss(task_objective, logits, rows[task.label], task_context(task, rows))

    @tf.function(reduce_retracing=True)
    def train_step(indices: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            total, count = loss_of({name: tf.gather(c, indices) for name, c in data["train"].items()}, True)
            loss = total / count
        variables = network.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    generator = np.random.default_rng(seed)
    best_loss, best_epoch, best_weights = np.inf, 0, None
    for epoch in range(MAX_EPOCHS):
        order = generator.permutation(len(logs["train"])).astype(np.int32)
        for start in range(0, len(order), BATCH_SIZE):
            train_step(tf.constant(order[start : start + BATCH_SIZE]))
        total, count = loss_of(data["eval"], False)
        loss = float(total / count)
        if loss < best_loss:
            best_loss, best_epoch, best_weights = loss, epoch, network.get_weights()
        elif epoch - best_epoch >= PATIENCE_EPOCHS:
            break
    network.set_weights(best_weights)
    return task_objective, network(data["test"]), task_context(task, data["test"])


def _tensors(log: WatchLog) -> dict[str, tf.Tensor]:
    return {name: tf.constant(column) for name, column in {**log.columns, "dense": log.dense}.items()}


def judge(log: WatchLog, predictions: FloatArray) -> dict[str, float]:
    """Metrics of predicted seconds [n] on the rows of a log.

    `mae`, `xauc` and `weighted_pairwise_loss` (a user's rows are its page) as in `trainer.metrics`;
    `calibration`: mean prediction over mean watch time; on simulated data `truth_mae` and `truth_rmse`,
    errors against the true expectation, and `truth_xauc`.
    """
    watched = log.watch_time_s
    values = {
        "mae": metrics.mae(watched, predictions),
        "xauc": metrics.xauc(watched, predictions),
        "calibration": float(np.mean(predictions) / watched.mean()),
        "weighted_pairwise_loss": metrics.weighted_pairwise_loss(
            log.columns[CLICK], watched, predictions, log.user_ids
        ),
    }
    if log.truth_s is not None:
        error = predictions - log.truth_s
        values["truth_mae"] = float(np.abs(error).mean())
        values["truth_rmse"] = float(np.sqrt(np.square(error).mean()))
        values["truth_xauc"] = metrics.xauc(log.truth_s, predictions)
    return values


def error_by_duration(log: WatchLog, predictions: FloatArray) -> list[dict[str, float]]:
    """Mean of prediction less watch time in each tenth of the rows by duration; unknown durations left out.

    Returns:
      `duration_s` (mean), `watch_time_s` (mean) and `error_s` of each tenth, shortest first.
    """
    rows = np.flatnonzero(~np.isnan(log.duration_s))
    rows = rows[np.argsort(log.duration_s[rows], kind="stable")]
    watched = log.watch_time_s
    return [
        {
            "duration_s": float(log.duration_s[part].mean()),
            "watch_time_s": float(watched[part].mean()),
            "error_s": float((predictions[part] - watched[part]).mean()),
        }
        for part in np.array_split(rows, _NUM_DECILES)
    ]


def predict(logs: Mapping[str, WatchLog], method: str, seed: int) -> FloatArray:
    """Seconds that a method serves for the test rows, float64 [n]."""
    if method in CONSTANTS:
        return np.full(len(logs["test"]), float(CONSTANTS[method](logs["train"].watch_time_s)))
    task = TaskSpec.model_validate({**_WATCH, **METHODS[method]})
    learnt, logits, context = fit(logs, task, HIDDEN_LAYERS, seed)
    if method == UNCORRECTED and isinstance(learnt, CovingtonLogistic):
        return learnt.uncorrected(logits).numpy().astype(np.float64)
    return learnt.output(logits, context).numpy().astype(np.float64)


def compare(logs: Mapping[str, WatchLog], methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Judges every method: name -> `metrics` (name -> mean and std over seeds) and `error_by_duration`."""
    results: dict[str, Any] = {}
    for method in methods:
        predicted = [predict(logs, method, seed) for seed in (seeds[:1] if method in CONSTANTS else seeds)]
        values = [judge(logs["test"], predictions) for predictions in predicted]
        results[method] = {
            "metrics": summary(values),
            "error_by_duration": error_by_duration(logs["test"], np.mean(predicted, axis=0)),
        }
        click.echo(f"{method}: " + "  ".join(f"{k} {v['mean']:.4f}" for k, v in summary(values).items()))
    return results


def table_2(logs: Mapping[str, WatchLog], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Weighted pairwise loss by hidden layers: clicks weighted by watch time, and equally.

    Both rank by the logit of their logistic regression, the former with the paper's weights.
    """
    tasks = {
        "watch-time weighting": TaskSpec.model_validate({**_WATCH, **_COVINGTON}),
        "equal weighting": TaskSpec(name=CLICK, label=CLICK, kind=TaskKind.BINARY),
    }
    test = logs["test"]
    results: dict[str, dict[str, Any]] = {}
    for layers in TABLE_2_LAYERS:
        name = "-".join(map(str, layers)) or "none"
        results[name] = {}
        for weighting, task in tasks.items():
            losses = []
            for seed in seeds:
                _, logits, _ = fit(logs, task, layers, seed)
                losses.append(
                    metrics.weighted_pairwise_loss(
                        test.columns[CLICK], test.watch_time_s, logits[:, 0].numpy(), test.user_ids
                    )
                )
            results[name][weighting] = mean_and_std(losses)
        click.echo(f"hidden layers {name}: " + _cells(results[name]))
    return results


def _cells(values: Mapping[str, Mapping[str, float | None]]) -> str:
    return " | ".join(
        f"{v['mean']:.4f}" + (f" ± {v['std']:.4f}" if v["std"] is not None else "") for v in values.values()
    )


def to_markdown(results: Mapping[str, Any], first: str) -> str:
    """A table of results, one line per key; each value maps a column to its mean and std."""
    columns = list(next(iter(results.values())))
    lines = [f"| {first} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    return "\n".join([*lines, *(f"| {name} | {_cells(values)} |" for name, values in results.items())]) + "\n"


def draw(results: Mapping[str, Any], dataset: str, path: Path) -> None:
    """Draws the mean error by duration of every method; the format follows the suffix of the path."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for number, (method, result) in enumerate(results.items()):
        tenths = result["error_by_duration"]
        axis.plot(
            [tenth["duration_s"] for tenth in tenths],
            [tenth["error_s"] for tenth in tenths],
            label=method,
            color=plt.get_cmap("tab20")(number % 20),
            marker="os^dv"[number % 5],
            markersize=4,
            linestyle="--" if method in CONSTANTS else "-",
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=5)
    axis.set_yticks([-30, -20, -10, -5, -2, 0, 2, 5, 10, 20, 30], minor=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("duration of the item, s (tenths of the test impressions)")
    axis.set_ylabel("mean of prediction − watch time, s")
    axis.set_title(f"Error of predicted watch time by duration, {dataset}")
    axis.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


@click.command(help=__doc__)
@click.option("--dataset", type=click.Choice(DATASETS), default=DATASETS[0], show_default=True)
@click.option(
    "--data-dir", type=click.Path(exists=True, path_type=Path), help="The official archive's folder."
)
@click.option(
    "--work-dir", type=click.Path(path_type=Path), default=Path("runs/benchmarks"), show_default=True
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--method", "chosen", multiple=True, type=click.Choice([*CONSTANTS, *METHODS]), help="Only these."
)
@click.option("--table-2/--no-table-2", "with_table_2", default=True, show_default=True)
@click.option("--figure", type=click.Path(path_type=Path), help="Error by duration, .png or .svg.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(
    dataset: str,
    data_dir: Path | None,
    work_dir: Path,
    seeds: int,
    chosen: Sequence[str],
    with_table_2: bool,
    figure: Path | None,
    json_path: Path | None,
) -> None:
    """See the docstring of the module."""
    logs = build_logs(*load(dataset, data_dir, work_dir))
    click.echo(f"{dataset}: " + ", ".join(f"{len(log):,} {name} rows" for name, log in logs.items()))
    results: dict[str, Any] = {"dataset": dataset, "seeds": seeds}
    results["methods"] = compare(logs, chosen or [*CONSTANTS, *METHODS], range(seeds))
    click.echo()
    by_method = {name: result["metrics"] for name, result in results["methods"].items()}
    click.echo(to_markdown(by_method, "method"))
    if with_table_2:
        results["table_2"] = table_2(logs, range(seeds))
        click.echo(to_markdown(results["table_2"], "hidden layers"))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if figure is not None:
        draw(results["methods"], dataset, figure)


if __name__ == "__main__":
    main()
