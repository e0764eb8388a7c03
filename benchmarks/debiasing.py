"""What debiasing recovers, on simulated logs whose truth is known.

A small ranker (embeddings of the ids, content, rates as of the night before, two hidden layers) is trained on
the simulator's default dataset with each way of debiasing, and judged where the truth is known:

- position: the learnt examination curves against the true ones, on the log as it is and on the log with each
  screen of the old policy sorted by that policy's score, as a ranker without randomness would show it;
- propensity: weights of inverse propensity against none, on uniformly random screens;
- sampling: down-sampled negatives against all, by weights and by correcting the logit.

Every world is a simulation and a model seed of its own; differences are paired over worlds. Training takes
the days before the last two; the random screens of the last two days, and all of the last day, judge.

Example, from the root of the repository:
  python -m benchmarks.debiasing --worlds 3 --json debiasing.json --plot docs/images/examination.svg
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.stats
import tensorflow as tf
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from schema.contract import TaskKind, TaskSpec
from tfx_pipeline.datasets.simulator import DEFAULT, EXAMINATION, simulate
from tfx_pipeline.datasets.simulator_world import DAY_S, TOPIC_WORDS, SimulatorConfig
from trainer import metrics
from trainer.debiasing import (
    PositionBias,
    correct_sampled_logit,
    inverse_propensity_weights,
    position_statistics,
    sample_negatives,
)
from trainer.debiasing_config import PositionConfig
from trainer.off_policy import effective_sample_size

Order = Literal["as logged", "sorted"]
ORDERS: tuple[Order, ...] = ("as logged", "sorted")
SURFACES = tuple(EXAMINATION)
CLICK = TaskSpec(name="click", label="click", kind=TaskKind.BINARY)
LIKE = TaskSpec(name="like", label="like", kind=TaskKind.BINARY)
NONE = "none"
INFORMED = "pal, relevance known"
POSITION_FORMS: Mapping[str, PositionConfig] = {
    NONE: PositionConfig(),
    "additive": PositionConfig(kind="additive", max_position=10),
    "pal": PositionConfig(kind="pal", max_position=10),
    "pal, exploration": PositionConfig(kind="pal", max_position=10, learn_from="exploration"),
}
CLIPS: tuple[float | None, ...] = (30, 100, 300, 1_000, 3_000, None)
RATES = (0.1, 0.25, 0.5)
SAMPLED_TASKS: Mapping[str, Sequence[TaskSpec]] = {"click and like": (CLICK, LIKE), "like alone": (LIKE,)}

BATCH_SIZE = 1_024
MIN_STEPS_PER_EPOCH = 50  # with few rows batches are smaller
LEARNING_RATE = 1e-3
MAX_EPOCHS = 20
PATIENCE_EPOCHS = 2
ID_DROPOUT_FRACTION = 0.1
EMBEDDING_PENALTY = 1e-4
_ID_WIDTHS = {"user": 16, "item": 16, "creator": 8}
_CATEGORIES = ("user_language", "item_language", "device", "age_bucket", "gender", "country")
# A rate as of the night before starts from the mean of all, counted as so many impressions.
_PRIOR_ROWS = 5.0

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Log:
    """A simulated log as model inputs. Shapes: [n] unless said.

    Attributes:
      inputs: ids and categories int32; `topics` float32 [n, T]; `numbers` float32 [n, F].
      sizes: number of values of each id and category.
      position, surface, exploration: of the impression.
      labels: `click` and `like`, float32.
      propensity: as logged.
      relevance: true probability of a click once examined.
      day: from 0.
    """

    inputs: Mapping[str, Array]
    sizes: Mapping[str, int]
    position: Array
    surface: Array
    exploration: Array
    labels: Mapping[str, Array]
    propensity: FloatArray
    relevance: FloatArray
    day: Array

    @property
    def train(self) -> Array:
        """Rows of the days before the last two."""
        return np.flatnonzero(self.day < self.day.max() - 1)

    @property
    def validation(self) -> Array:
        """Rows of the last day but one, random screens left out."""
        return np.flatnonzero((self.day == self.day.max() - 1) & (self.exploration == 0))

    @property
    def last_day(self) -> Array:
        """All rows of the last day."""
        return np.flatnonzero(self.day == self.day.max())

    @property
    def random(self) -> Array:
        """Rows of the random screens of the last two days."""
        return np.flatnonzero((self.day >= self.day.max() - 1) & (self.exploration == 1))


def sort_screens(log: pl.DataFrame) -> pl.DataFrame:
    """The same screens with the items of each in the order of the old policy's score, and the clicks it gets.

    The policy filled positions by Plackett-Luce sampling, so the weights of a screen's items are proportional
    to propensity × the chance that none above was drawn. An item takes its `relevant` draw along, a position
    keeps its `examined` draw; a click needs both. Random screens stay as they are.

    Args:
      log: interactions with the columns `examined` and `relevant` of the truth.
    """
    above = (1 - pl.col("propensity")).clip(1e-12).log().cum_sum().shift(1, fill_value=0.0)
    log_weight = pl.col("propensity").log() + above.over("request_id", order_by="position")
    rank = (-log_weight).rank("ordinal").over("request_id").cast(pl.Int64)
    slots = log.select("request_id", "position", "examined")
    moved = log.drop("examined").with_columns(
        position=pl.when(pl.col("exploration") == 1).then("position").otherwise(rank)
    )
    return moved.join(slots, on=["request_id", "position"], how="left", maintain_order="left").with_columns(
        is_click=(pl.col("examined") & pl.col("relevant")).cast(pl.Int8)
    )


def read_log(folder: Path, order: Order) -> Log:
    """The impressions of a simulated world as model inputs."""
    truth = pl.read_parquet(folder / "truth" / "impressions.parquet")
    columns = truth.select("click_probability", "examined", "relevant")
    log = pl.read_parquet(folder / "interactions.parquet").with_columns(columns)
    if order == "sorted":
        log = sort_screens(log)
    users = pl.read_parquet(folder / "users.parquet").with_row_index("user")
    items = pl.read_parquet(folder / "items.parquet").with_row_index("item").drop("duration_s")
    log = log.join(users, on="user_id", how="left", maintain_order="left")
    log = log.join(items, on="item_id", how="left", maintain_order="left")
    log = log.with_columns(creator=pl.col("creator_id").cast(pl.Categorical).to_physical())

    inputs: dict[str, Array] = {
        name: log[name].to_numpy().astype(np.int32) for name in ("user", "item", "creator")
    }
    for name in _CATEGORIES:
        inputs[name] = log[name].fill_null("").cast(pl.Categorical).to_physical().to_numpy().astype(np.int32)
    surface = (log["surface"] == SURFACES[1]).to_numpy().astype(np.int32)
    inputs["surface"] = surface
    sizes = {name: int(ids.max()) + 1 for name, ids in inputs.items()}

    time_s = log["event_time"].to_numpy()
    day = (time_s - time_s.min()) // DAY_S
    clicks = log["is_click"].to_numpy().astype(np.float32)
    topics = _topics(log["topics"])
    wanted = _topics(log["search_tokens"])
    inputs["topics"] = topics
    numbers = [
        log.select(pl.col("subscribed_creators").list.contains(pl.col("creator_id"))).to_series(),
        log["user_language"] == log["item_language"],
        np.log1p((log["event_time"] - log["upload_time"]).to_numpy() / DAY_S),
        np.log(log["duration_s"].to_numpy()),
        (wanted * topics).sum(axis=1),
        *_rates(inputs["item"][:, np.newaxis], np.ones((len(log), 1)), clicks, day),
        *_rates(inputs["user"][:, np.newaxis], np.ones((len(log), 1)), clicks, day),
        *_rates(
            inputs["user"][:, np.newaxis] * topics.shape[1] + np.arange(topics.shape[1]), topics, clicks, day
        ),
    ]
    flat = [np.nan_to_num(np.asarray(column, np.float64)) for column in numbers]
    inputs["numbers"] = np.column_stack([*flat, topics, wanted]).astype(np.float32)
    return Log(
        inputs,
        sizes,
        log["position"].to_numpy().astype(np.int32),
        surface,
        log["exploration"].to_numpy(),
        {"click": clicks, "like": log["is_like"].to_numpy().astype(np.float32)},
        log["propensity"].to_numpy(),
        log["click_probability"].to_numpy(),
        day,
    )


def _topics(words: pl.Series) -> Array:
    """float32 [n, T], 1 for every topic that a list of topics or of search words names."""
    number = {name: i for i, name in enumerate(TOPIC_WORDS)}
    number |= {word: number[topic] for topic, text in TOPIC_WORDS.items() for word in text.split()}
    result = np.zeros((len(words), len(TOPIC_WORDS)), np.float32)
    named = pl.DataFrame({"row": np.arange(len(words)), "word": words}).explode("word").drop_nulls()
    result[named["row"], named["word"].replace_strict(number, return_dtype=pl.Int64)] = 1
    return result


def _rates(keys: Array, shares: Array, clicks: Array, day: Array) -> tuple[FloatArray, FloatArray]:
    """Log click rate and log number of impressions of a row's keys, from the days before its own.

    Args:
      keys: int [n, K].
      shares: float [n, K], how much the impression counts for each key.
      clicks: [n].
      day: [n].

    Returns:
      float64 [n] each, means over a row's keys weighted by its shares.
    """
    seen, clicked = np.zeros(keys.max() + 1), np.zeros(keys.max() + 1)
    rate, amount = np.zeros(len(keys)), np.zeros(len(keys))
    mean = clicks[day == 0].mean()
    total = np.maximum(shares.sum(axis=1), 1)
    for today in range(day.max() + 1):
        rows = day == today
        k, s = keys[rows], shares[rows]
        smoothed = (clicked[k] + _PRIOR_ROWS * mean) / (seen[k] + _PRIOR_ROWS)
        rate[rows] = (np.log(smoothed) * s).sum(axis=1) / total[rows]
        amount[rows] = (np.log1p(seen[k]) * s).sum(axis=1) / total[rows]
        np.add.at(seen, k, s)
        np.add.at(clicked, k, s * clicks[rows, np.newaxis])
    return rate, amount


class SmallRanker(tf.keras.Model):
    """Embeddings, their products and content into two hidden layers; one logit per task, [B, tasks]."""

    def __init__(self, log: Log, num_tasks: int) -> None:
        """Makes an untrained model; numbers are scaled by those of the training rows."""
        super().__init__()
        self.tables = {
            name: tf.keras.layers.Embedding(size, _ID_WIDTHS.get(name, 4)) for name, size in log.sizes.items()
        }
        self.tastes = tf.keras.layers.Embedding(
            log.sizes["user"], log.inputs["topics"].shape[1], embeddings_initializer="zeros"
        )
        self.biases = {
            name: tf.keras.layers.Embedding(log.sizes[name], num_tasks, embeddings_initializer="zeros")
            for name in _ID_WIDTHS
        }
        numbers = log.inputs["numbers"][log.train]
        self.scale = tf.keras.layers.Normalization(mean=numbers.mean(axis=0), variance=numbers.var(axis=0))
        self.hidden = tf.keras.Sequential(
            [
                tf.keras.layers.Dense(64, activation="relu"),
                tf.keras.layers.Dropout(0.1),
                tf.keras.layers.Dense(32, activation="relu"),
            ]
        )
        self.heads = tf.keras.layers.Dense(num_tasks)

    # Nothing here branches on a tensor; AutoGraph would take as long as the training.
    @tf.autograph.experimental.do_not_convert
    def call(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Logits float32 [B, tasks]."""
        embedded = {name: table(inputs[name]) for name, table in self.tables.items()}
        if training:
            for name in _ID_WIDTHS:
                keep = tf.random.uniform([tf.shape(embedded[name])[0], 1]) >= ID_DROPOUT_FRACTION
                embedded[name] *= tf.cast(keep, tf.float32)
        match = embedded["user"] * embedded["item"]
        taste = self.tastes(inputs["user"]) * inputs["topics"]
        similarities = tf.reduce_sum(match, -1, keepdims=True) + tf.reduce_sum(taste, -1, keepdims=True)
        hidden = self.hidden(
            tf.concat([*embedded.values(), match, self.scale(inputs["numbers"])], axis=-1), training=training
        )
        return self.heads(hidden) + similarities + tf.add_n([b(inputs[n]) for n, b in self.biases.items()])

    def penalty(self) -> tf.Tensor:
        """Of large embeddings."""
        tables = [*self.tables.values(), self.tastes, *self.biases.values()]
        return EMBEDDING_PENALTY * tf.add_n([tf.nn.l2_loss(table.embeddings) for table in tables])


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained small ranker on all rows of its log.

    Attributes:
      logits: float32 [n, tasks], of the body: without position, and as over all negatives.
      bias: the position tower of the click task, if any.
      epochs: until the validation loss stopped falling.
      seconds: processor time of all epochs.
    """

    logits: Array
    bias: PositionBias | None
    epochs: int
    seconds: float

    def served(self, log: Log) -> FloatArray:
        """Click probability as a ranker would serve it, [n]."""
        logits = self.logits[:, 0]
        if self.bias is None:
            return expit(logits.astype(np.float64))
        return expit(self.bias.served(logits, log.surface).numpy().astype(np.float64))


def fit(
    log: Log,
    seed: int,
    config: PositionConfig = POSITION_FORMS[NONE],
    tasks: Sequence[TaskSpec] = (CLICK,),
    rows: Array | None = None,
    weights: Array | None = None,
    sampled_rate: float = 1.0,
) -> Trained:
    """Trains until the validation loss, which is that of all rows without weights, stops falling.

    Args:
      log: the impressions.
      seed: of initial weights and order.
      config: position of the click task.
      tasks: the first is the click.
      rows: which rows to train on, those of the training days by default.
      weights: float [n] of all rows of the log; all alike by default.
      sampled_rate: share of the negatives among `rows`, which the logits are corrected for.
    """
    tf.keras.utils.set_random_seed(seed)
    rows = log.train if rows is None else rows
    model = SmallRanker(log, len(tasks))
    bias = None
    if config.kind != NONE:
        window = {
            "position": log.position,
            "surface": log.surface,
            "exploration": log.exploration,
            **log.labels,
        }
        window = {name: column[rows] for name, column in window.items()}
        statistics = position_statistics([window], [CLICK], config, len(SURFACES), "surface")
        bias = PositionBias(config, CLICK, statistics["click"])
    data = {name: tf.constant(column) for name, column in log.inputs.items()}
    position, surface = tf.constant(log.position), tf.constant(log.surface)
    labels = tf.constant(np.column_stack([log.labels[task.label] for task in tasks]))
    row_weights = tf.constant(np.ones(len(log.day)) if weights is None else weights, tf.float32)
    optimizer = tf.keras.optimizers.Adam(LEARNING_RATE)

    def shown(chosen: tf.Tensor, training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        logits = model({name: tf.gather(column, chosen) for name, column in data.items()}, training=training)
        if bias is None:
            return logits, logits
        click_logit = bias(
            logits[:, 0], tf.gather(position, chosen), tf.gather(surface, chosen), training=training
        )
        return logits, tf.concat([click_logit[:, tf.newaxis], logits[:, 1:]], axis=1)

    rows_spec = [tf.TensorSpec([None], tf.int64)]

    @tf.function(autograph=False, input_signature=rows_spec)
    def step(chosen: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            losses = tf.nn.sigmoid_cross_entropy_with_logits(
                tf.gather(labels, chosen), shown(chosen, True)[1]
            )
            weight = tf.gather(row_weights, chosen)[:, tf.newaxis]
            loss = tf.reduce_sum(weight * losses) / tf.reduce_sum(weight) + model.penalty()
        variables = model.trainable_variables + (bias.trainable_variables if bias else [])
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    @tf.function(autograph=False, input_signature=rows_spec)
    def judge(chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        body, as_shown = shown(chosen, False)
        corrected = correct_sampled_logit(as_shown, sampled_rate)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(tf.gather(labels, chosen), corrected)
        return correct_sampled_logit(body, sampled_rate), tf.reduce_mean(tf.reduce_sum(losses, axis=1))

    def variables() -> list[tf.Variable]:
        return model.variables + (bias.variables if bias else [])

    judge(tf.constant(log.validation[:1]))
    shares = None if weights is None else weights[rows]
    rates = np.array([np.average(log.labels[task.label][rows], weights=shares) for task in tasks])
    model.heads.bias.assign(logit(rates))
    batch_size = max(1, min(BATCH_SIZE, len(rows) // MIN_STEPS_PER_EPOCH))
    rng, seconds, epoch = np.random.default_rng(seed), 0.0, 0
    best_loss, best_epoch, best = np.inf, 0, [variable.numpy() for variable in variables()]
    while epoch < MAX_EPOCHS and epoch - best_epoch < PATIENCE_EPOCHS:
        epoch += 1
        start = time.process_time()
        order = rng.permutation(rows)
        for batch in np.split(order, np.arange(batch_size, len(order), batch_size)):
            step(tf.constant(batch))
        seconds += time.process_time() - start
        loss = float(judge(tf.constant(log.validation))[1])
        if loss < best_loss:
            best_loss, best_epoch, best = loss, epoch, [variable.numpy() for variable in variables()]
    for variable, value in zip(variables(), best, strict=True):
        variable.assign(value)
    logits = judge(tf.range(len(log.day), dtype=tf.int64))[0].numpy()
    return Trained(logits, bias, epoch, seconds)


def expected_auc(probabilities: FloatArray, scores: FloatArray) -> float:
    """AUC when every row is a positive with its probability: without the noise of drawing labels.

    Each row counts as a positive with weight r and as a negative with weight 1 − r.
    """
    half = np.ones(len(scores))
    return float(
        roc_auc_score(
            np.concatenate([half, 0 * half]),
            np.concatenate([scores, scores]),
            sample_weight=np.concatenate([probabilities, 1 - probabilities]),
        )
    )


def judged(log: Log, served: FloatArray) -> dict[str, float]:
    """Metrics of served click probabilities [n].

    `auc_random`, `auc_random_truth`: on random screens, of clicks, and of the true relevance;
    `calibration_random`: mean served / click rate there; `auc_last_day`, `calibration_last_day`: all screens.
    """
    clicks, random, last = log.labels["click"], log.random, log.last_day
    return {
        "auc_random": metrics.auc(clicks[random], served[random]),
        "auc_random_truth": expected_auc(log.relevance[random], served[random]),
        "calibration_random": float(served[random].mean() / clicks[random].mean()),
        "auc_last_day": metrics.auc(clicks[last], served[last]),
        "calibration_last_day": float(served[last].mean() / clicks[last].mean()),
    }


Variant = tuple[str, Callable[[], dict[str, Any]]]


def position_part(log: Log, seed: int) -> Iterator[Variant]:
    """Each form of the position tower: metrics, and curves by surface with their deviation from the truth.

    The last variant reads the true relevance: what its curve is off by, no better body could mend.
    """

    def measure(log: Log, config: PositionConfig) -> dict[str, Any]:
        trained = fit(log, seed, config)
        result: dict[str, Any] = judged(log, trained.served(log)) | {"epochs": trained.epochs}
        seen = log.relevance[log.last_day].mean()
        result["seen_over_truth"] = float(expit(trained.logits[log.last_day, 0]).mean() / seen)
        if trained.bias is None:
            curve = np.ones((len(SURFACES), max(map(len, EXAMINATION.values())) + 1))
        else:
            curve = trained.bias.examination_curve(trained.logits[log.train, 0], log.surface[log.train])
        return result | curve_errors(curve)

    for name, config in POSITION_FORMS.items():
        yield name, lambda config=config: measure(log, config)
    numbers = np.column_stack([log.inputs["numbers"], logit(log.relevance)]).astype(np.float32)
    informed = dataclasses.replace(log, inputs={**log.inputs, "numbers": numbers})
    yield INFORMED, lambda: measure(informed, POSITION_FORMS["pal"])


def curve_errors(curve: FloatArray) -> dict[str, Any]:
    """Curve by surface, and its largest and mean deviation from the truth past the first position."""
    result: dict[str, Any] = {}
    for s, (surface, truth) in enumerate(EXAMINATION.items()):
        learnt = curve[s, 1 : len(truth) + 1]
        off = np.abs(learnt - truth)[1:]
        result[f"curve_{surface}"] = learnt.tolist()
        result[f"max_off_{surface}"], result[f"mean_off_{surface}"] = float(off.max()), float(off.mean())
    return result


def propensity_part(log: Log, seed: int) -> Iterator[Variant]:
    """No weights, weights cut at different sizes, and the random screens alone; all with "pal" positions."""
    train, config = log.train, POSITION_FORMS["pal"]

    def weighted(clip: float | None) -> dict[str, Any]:
        found = inverse_propensity_weights(log.propensity[train], log.exploration[train], clip)
        weights = np.ones(len(log.day))
        weights[train] = found.weights
        size = {"effective_sample_size": found.effective_sample_size, "num_clipped": found.num_clipped}
        return judged(log, fit(log, seed, config, weights=weights).served(log)) | size

    yield "no weights", lambda: judged(log, fit(log, seed, config).served(log))
    for clip in CLIPS:
        name = "not cut" if clip is None else f"cut at {clip:,}"
        yield name, lambda clip=clip: weighted(clip)
    random_rows = train[log.exploration[train] == 1]
    yield "random screens only", lambda: judged(log, fit(log, seed, config, rows=random_rows).served(log))


def sampling_part(log: Log, seed: int, tasks: Sequence[TaskSpec]) -> Iterator[Variant]:
    """All rows; fewer negatives, by weights and by correcting logits; without positions."""
    train, last = log.train, log.last_day
    key = [tf.constant(log.inputs[name][train]) for name in ("user", "item")] + [tf.constant(log.day[train])]
    labels = [tf.constant(log.labels[task.label][train]) for task in tasks]

    def measure(rate: float, corrects: bool) -> dict[str, Any]:
        sample = sample_negatives(labels, key, rate, seed)
        weights = np.ones(len(log.day))
        weights[train] = 1.0 if corrects else sample.weights.numpy()
        rows = train[sample.keep.numpy()]
        trained = fit(
            log, seed, tasks=tasks, rows=rows, weights=weights, sampled_rate=rate if corrects else 1.0
        )
        result: dict[str, Any] = {
            "rows": len(rows),
            "effective_sample_size": effective_sample_size(weights[rows]),
            "epochs": trained.epochs,
            "cpu_s_per_epoch": trained.seconds / trained.epochs,
            "cpu_s": trained.seconds,
        }
        for i, task in enumerate(tasks):
            label, served = log.labels[task.label][last], expit(trained.logits[last, i].astype(np.float64))
            result[f"{task.name}_auc"] = metrics.auc(label, served)
            result[f"{task.name}_log_loss"] = metrics.log_loss(label, served)
            result[f"{task.name}_calibration"] = float(served.mean() / label.mean())
        return result

    yield "all rows", lambda: measure(1.0, corrects=False)
    for rate in RATES:
        yield f"{rate:.0%}, weights", lambda rate=rate: measure(rate, corrects=False)
        yield f"{rate:.0%}, corrected logit", lambda rate=rate: measure(rate, corrects=True)


PARTS = ("position", "propensity", "sampling")
# Of each part's table, in the order of the columns.
SHOWN_METRICS: Mapping[str, Sequence[str]] = {
    "position": (
        *(f"{kind}_off_{surface}" for surface in SURFACES for kind in ("max", "mean")),
        "auc_random",
        "auc_random_truth",
        "auc_last_day",
        "calibration_last_day",
        "seen_over_truth",
    ),
    "propensity": (
        "auc_random",
        "auc_random_truth",
        "calibration_random",
        "auc_last_day",
        "calibration_last_day",
        "effective_sample_size",
    ),
    "sampling": (
        *(f"{task}_{metric}" for task in ("click", "like") for metric in ("auc", "log_loss", "calibration")),
        "rows",
        "effective_sample_size",
        "epochs",
        "cpu_s_per_epoch",
        "cpu_s",
    ),
}

# Those whose paired differences are shown.
COMPARED_METRICS = ("auc_random", "auc_random_truth", "auc_last_day", "click_auc", "like_auc")

Results = dict[str, dict[str, list[dict[str, Any]]]]


class Section(NamedTuple):
    """One table: `variants` are measured on the log whose screens are in this `order`."""

    title: str
    part: str
    order: Order
    variants: Callable[[Log, int], Iterator[Variant]]


def sections(parts: Sequence[str]) -> list[Section]:
    """The tables of these parts.

    Of sampling there are two, as it depends on how rare positives are: nearly half of the rows have a click,
    hardly any has a like.
    """
    every = [Section(f"position, {order}", "position", order, position_part) for order in ORDERS]
    every.append(Section("propensity", "propensity", "as logged", propensity_part))
    for name, tasks in SAMPLED_TASKS.items():
        variants = functools.partial(sampling_part, tasks=tasks)
        every.append(Section(f"sampling, {name}", "sampling", "as logged", variants))
    return [section for section in every if section.part in parts]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and the p-value of the two-sided paired t-test; NaN for one world."""
    gap = np.asarray(ours) - np.asarray(theirs)
    if len(gap) < 2 or not gap.std():
        return float(gap.mean()), float("nan")
    return float(gap.mean()), float(scipy.stats.ttest_rel(ours, theirs).pvalue)


def to_markdown(results: Results) -> str:
    """One table per section, mean ± standard deviation over worlds; paired differences from the first."""
    lines: list[str] = []
    for section, variants in results.items():
        part = section.split(",")[0]
        shown = [m for m in SHOWN_METRICS[part] if any(m in w[0] for w in variants.values())]
        lines += [f"## {section}", "", f"| | {' | '.join(shown)} |", "| --- |" + " ---: |" * len(shown)]
        for name, worlds in variants.items():
            cells = [_cell([world[m] for world in worlds]) if m in worlds[0] else "" for m in shown]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        first = next(iter(variants))
        lines += ["", f"Less '{first}', paired over {len(variants[first])} worlds (p of the t-test):", ""]
        for name, worlds in list(variants.items())[1:]:
            gaps = []
            for metric in COMPARED_METRICS:
                if metric not in worlds[0] or metric not in variants[first][0]:
                    continue
                gap, p = difference([w[metric] for w in worlds], [w[metric] for w in variants[first]])
                gaps.append(f"{metric} {gap:+.4f} (p = {p:.2g})")
            lines.append(f"- {name}: {', '.join(gaps)}")
        lines.append("")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    mean = np.mean(values)
    if mean >= 100:
        return f"{mean:,.0f}"
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{mean:.4f}{spread}"


def draw(results: Results, path: Path) -> None:
    """Learnt and true examination curves: a row per order of the screens, a column per surface."""
    matplotlib.rcParams["svg.hashsalt"] = "debiasing"
    figure, grid = plt.subplots(len(ORDERS), len(SURFACES), figsize=(11, 7.5), layout="constrained")
    for axes, order in zip(grid, ORDERS, strict=True):
        for axis, surface in zip(axes, SURFACES, strict=True):
            truth = EXAMINATION[surface]
            positions = np.arange(1, len(truth) + 1)
            axis.plot(positions, truth, color="black", lw=2.5, label="true")
            for name, worlds in results[f"position, {order}"].items():
                if name == NONE:
                    continue
                curves = np.array([world[f"curve_{surface}"] for world in worlds])
                mean, spread = curves.mean(axis=0), curves.std(axis=0)
                (line,) = axis.plot(positions, mean, marker="o", ms=3.5, label=name)
                axis.fill_between(positions, mean - spread, mean + spread, color=line.get_color(), alpha=0.18)
            axis.set(title=f"{surface}, screens {order}", xlabel="position", ylim=(0, 1.05))
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=8)
        axes[0].set_ylabel("examination / that of position 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


@click.command(help=__doc__)
@click.option("--worlds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Every number, by world.")
@click.option("--plot", type=click.Path(path_type=Path), help="The examination curves, .svg or .png.")
def main(worlds: int, parts: Sequence[str], json_path: Path | None, plot: Path | None) -> None:
    """See the docstring of the module."""
    planned = sections(parts or PARTS)
    results: Results = {section.title: {} for section in planned}
    with tempfile.TemporaryDirectory() as folder:
        for world in range(worlds):
            config: SimulatorConfig = dataclasses.replace(DEFAULT, seed=DEFAULT.seed + world)
            simulate(config, Path(folder) / str(world))
            logs = {order: read_log(Path(folder) / str(world), order) for order in {s.order for s in planned}}
            for section in planned:
                for name, measure in section.variants(logs[section.order], world):
                    measured = measure()
                    results[section.title].setdefault(name, []).append(measured)
                    shown = {m: round(v, 4) for m, v in measured.items() if np.isscalar(v)}
                    click.echo(f"world {world}, {section.title}, {name}: {shown}")
            if json_path:
                json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    click.echo(to_markdown(results))
    if plot and "position" in {section.part for section in planned}:
        draw(results, plot)


if __name__ == "__main__":
    main()
