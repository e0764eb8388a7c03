"""The pre-ranker learns from the ranker: requests, candidates drawn for them, and the ranker's final scores.

Needs no labels. How well it went is survival: the share of the ranker's best candidates of a request that the
pre-ranker keeps, on requests of users it was not distilled on.

Letters: U = requests, N = candidates per request, I = items of the catalogue and one for unknown items; Q and
F = widths of what is known of a request and of an item.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from schema.contract import DatasetSpec, FeatureKind
from schema.errors import DataError, ShapeError
from schema.point_in_time import IMPRESSIONS, count_names, log_count_names
from trainer import features as ft
from trainer import metrics
from trainer.input_pipeline import Window
from trainer.preranker import PreRanker, describe_items, describe_query
from trainer.preranker_config import PrerankerConfig
from trainer.ranking import RankingModel

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
Features = Mapping[str, Any]

# Survival: of how many candidates how many are kept, and how many of the ranker's best are looked for.
NUM_CANDIDATES, NUM_KEPT, NUM_BEST = 5_000, 500, 50
SURVIVAL = metrics.metric_key("preranking", "survival", k=NUM_KEPT)
# Ranks are shifted by this in Zipf's law: the very first items would fill every list.
_ZIPF_SHIFT = 10.0
# Pairs that the ranker scores at a time.
_PAIRS = 16_384
_USER_ID = ft.Feature(ft.USER_ID, FeatureKind.CATEGORICAL, ft.USER_ID).id_name

_logger = logging.getLogger(__name__)


class Distilled(NamedTuple):
    """A pre-ranker and how it came about.

    Attributes:
      student: with the weights of the best epoch.
      log: one record per epoch: `epoch` (from 1), `seconds`, `train_loss`; and of the held-out requests
        `eval_loss` and SURVIVAL.
      survival: on the held-out requests, SURVIVAL of the student and, for comparison, of three orders that
        are no model: `preranking/<order>/...` for `same_for_all`, by the ranker's mean score in the requests
        distilled on; `popularity`; and `random`.
    """

    student: PreRanker
    log: list[dict[str, float]]
    survival: dict[str, float]


class Labelled(NamedTuple):
    """Requests with candidates and what the ranker says about them.

    Attributes:
      queries: float32 [U, Q], see `describe_query`.
      rows: int32 [U, N], rows of the catalogue.
      scores: float32 [U, N], the ranker's final scores.
    """

    queries: FloatArray
    rows: IntArray
    scores: FloatArray


class Teacher:
    """The ranker as it scores items of a catalogue by their rows."""

    def __init__(self, ranker: RankingModel, items: Features) -> None:
        """Keeps both.

        Args:
          ranker: trained.
          items: of the catalogue, see `trainer.preranker.catalogue_features`.
        """
        self.ranker, self.items = ranker, dict(items)
        self._label = tf.function(self._score, autograph=False, reduce_retracing=True)

    @property
    def num_items(self) -> int:
        """I."""
        return int(next(iter(self.items.values())).shape[0])

    def label(self, features: Features, rows: IntArray) -> Labelled:
        """The final scores of candidates.

        Args:
          features: transformed query features and impressions of U requests.
          rows: int32 [U, N].
        """
        step = max(1, _PAIRS // rows.shape[1])
        parts = []
        for start in range(0, len(rows), step):
            piece = {name: tf.constant(column[start : start + step]) for name, column in features.items()}
            parts.append([x.numpy() for x in self._label(piece, tf.constant(rows[start : start + step]))])
        queries, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Labelled(queries, rows, scores)

    def _score(self, features: Features, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ranker, num_candidates = self.ranker, tf.shape(rows)[1]
        pairs = {name: tf.gather(column, tf.reshape(rows, [-1])) for name, column in self.items.items()}
        for name in ranker.output_features:
            pairs[name] = tf.repeat(features[name], num_candidates)
        query = ranker.encode_query(features)
        outputs = ranker.predictions(ranker.logits(query, pairs, num_candidates), pairs)
        return describe_query(ranker, query), tf.reshape(ranker.score(outputs), tf.shape(rows))


def latest_requests(windows: Iterable[Window], max_requests: int, seed: int) -> dict[str, np.ndarray]:
    """The latest request of each user, as the ranker read it in training.

    Args:
      windows: training windows with impressions, see `trainer.input_pipeline.windows`.
      max_requests: users are drawn at random if there are more.
      seed: of the draw.

    Returns:
      Transformed features of U requests by name: [U], lists [U, L] padded with 0.
    """
    windows = list(windows)
    found = []
    for number, window in enumerate(windows):
        users, days = (np.asarray(window[name]).astype(np.int64) for name in (_USER_ID, ft.DAYS_TO_END))
        places = np.arange(len(users))
        found.append(np.stack([users, -days, np.full_like(users, number), places], axis=1))
    table = np.concatenate(found)
    # Within a user the latest day comes last, and within a day what the files hold last.
    table = table[np.lexsort(table.T[::-1])]
    latest = table[np.append(table[1:, 0] != table[:-1, 0], True)]
    chosen = np.random.default_rng(seed).permutation(latest)[:max_requests]
    parts = [
        {name: np.asarray(column)[chosen[chosen[:, 2] == number, 3]] for name, column in window.items()}
        for number, window in enumerate(windows)
    ]
    return {name: _stack([part[name] for part in parts]) for name in windows[0]}


def _stack(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Rows below each other; lists are padded with 0 to the longest."""
    if columns[0].ndim == 1:
        return np.concatenate(columns)
    width = max(column.shape[1] for column in columns)
    return np.concatenate([np.pad(c, ((0, 0), (0, width - c.shape[1]))) for c in columns])


def item_popularity(items: Features, spec: DatasetSpec) -> FloatArray:
    """How often items were shown before the end of training, as the counters say: float32 [I], in [0, 1].

    Args:
      items: of the catalogue, see `trainer.preranker.catalogue_features`.
      spec: declares the counters; without the key item_id, the first one stands for it.
    """
    keys = spec.counters.keys
    key = ft.ITEM_ID if ft.ITEM_ID in keys else keys[0]
    names = count_names(spec)[len(log_count_names(spec)) :]
    return np.asarray(items[ft.COUNTERS])[:, names.index(f"{key}_all_{IMPRESSIONS}")]


def draw_candidates(
    popularity: FloatArray, num_requests: int, config: PrerankerConfig, rng: np.random.Generator
) -> IntArray:
    """Candidates for the ranker to label, with repetition: some by Zipf's law over popularity, some uniform.

    Args:
      popularity: float32 [I].
      num_requests: U.
      config: `num_candidates`, `popular_fraction`.
      rng: source of the draw.

    Returns:
      int32 [U, N].
    """
    num_popular = round(config.num_candidates * config.popular_fraction)
    chance = 1.0 / (_ZIPF_SHIFT + np.arange(len(popularity)))
    by_popularity = np.argsort(-popularity, kind="stable")
    ranks = rng.choice(len(chance), (num_requests, num_popular), p=chance / chance.sum())
    uniform = rng.integers(len(chance), size=(num_requests, config.num_candidates - num_popular))
    return np.concatenate([by_popularity[ranks], uniform], axis=1).astype(np.int32)


def listwise_loss(scores: tf.Tensor, logits: tf.Tensor, temperature: float) -> tf.Tensor:
    """Mean cross-entropy between what the ranker and the pre-ranker find probable to come first.

    p = softmax(z / T), z = (score - mean) / standard deviation over the candidates of the request;
    loss = - Σ p log softmax(logits).

    Args:
      scores: float32 [U, N], the ranker's.
      logits: float32 [U, N], the pre-ranker's scores.
      temperature: T > 0.

    Returns:
      float32 [].

    Source: Cao et al., ICML 2007 (ListNet), section 4, for k = 1; the temperature as in Hinton et al.,
    arXiv:1503.02531, section 2. There both sides are divided by it; here the pre-ranker's scores have no
    unit to keep.
    """
    targets = tf.nn.softmax(standardised(scores) / temperature)
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))


def squared_loss(scores: tf.Tensor, predicted: tf.Tensor) -> tf.Tensor:
    """Mean squared difference to the ranker's scores standardised within each request; float32 [U, N]."""
    return tf.reduce_mean(tf.math.squared_difference(standardised(scores), predicted))


def distillation_loss(scores: tf.Tensor, predicted: tf.Tensor, config: PrerankerConfig) -> tf.Tensor:
    """The loss that the settings name; see `listwise_loss` and `squared_loss`."""
    if config.loss == "listwise":
        return listwise_loss(scores, predicted, config.temperature)
    return squared_loss(scores, predicted)


def standardised(scores: tf.Tensor) -> tf.Tensor:
    """(score - mean) / standard deviation over the last axis; zeros where all scores are equal."""
    mean, variance = tf.nn.moments(scores, axes=[-1], keepdims=True)
    return (scores - mean) * tf.math.rsqrt(tf.maximum(variance, 1e-12))


def survival(
    ranker_scores: npt.ArrayLike,
    scores: npt.ArrayLike,
    num_kept: int = NUM_KEPT,
    num_best: int = NUM_BEST,
) -> npt.NDArray[np.float64]:
    """Share of the ranker's best candidates that are among the first by other scores.

    Of equal scores the earlier candidate comes first. With at most `num_kept` candidates it is 1; a random
    order has num_kept / N.

    Args:
      ranker_scores: [U, N].
      scores: [U, N], of the same candidates.
      num_kept: how many are kept.
      num_best: how many are looked for; all, where there are fewer.

    Returns:
      float64 [U], 0 to 1.

    Raises:
      ShapeError: the two have not the same two dimensions, or there are no candidates.

    >>> survival([[9.0, 8.0, 1.0, 2.0]], [[5.0, 1.0, 4.0, 3.0]], num_kept=2, num_best=2)
    array([0.5])
    """
    ours, theirs = np.asarray(scores), np.asarray(ranker_scores)
    if ours.shape != theirs.shape or ours.ndim != 2 or not ours.shape[1]:
        raise ShapeError(
            f"scores {ours.shape} and the ranker's {theirs.shape}; expected [U, N] twice, with N at least 1"
        )
    best = np.argsort(-theirs, axis=1, kind="stable")[:, :num_best]
    kept = np.zeros(ours.shape, bool)
    np.put_along_axis(kept, np.argsort(-ours, axis=1, kind="stable")[:, :num_kept], True, axis=1)
    return np.take_along_axis(kept, best, axis=1).mean(axis=1)


def mean_scores(labelled: Labelled, num_items: int) -> FloatArray:
    """The ranker's mean score of each item less the means of the requests: float32 [I], 0 if never drawn."""
    above = labelled.scores - labelled.scores.mean(axis=1, keepdims=True)
    sums = np.bincount(labelled.rows.ravel(), above.ravel(), num_items)
    counts = np.bincount(labelled.rows.ravel(), minlength=num_items)
    return (sums / np.maximum(counts, 1)).astype(np.float32)


def distil(
    ranker: RankingModel,
    requests: Features,
    items: Features,
    spec: DatasetSpec,
    config: PrerankerConfig,
) -> Distilled:
    """Trains a pre-ranker to order candidates as the ranker does.

    Keeps the weights of the epoch with the lowest loss on users who were held out.

    Args:
      ranker: trained and calibrated; is not changed.
      requests: transformed query features and impressions of requests, best one per user, see
        `latest_requests`.
      items: of the catalogue, see `trainer.preranker.catalogue_features`.
      spec: the declaration of the dataset.
      config: sizes and training.

    Raises:
      DataError: the requests are of fewer than two users, or the ranker's scores or the loss are not finite.
    """
    rng = np.random.default_rng(config.seed)
    tf.keras.utils.set_random_seed(config.seed)
    teacher = Teacher(ranker, items)
    popularity = item_popularity(items, spec)
    trained_on, held_out = _split_by_user(requests, config, rng)

    start = time.perf_counter()
    rows = draw_candidates(popularity, _count(trained_on), config, rng)
    labelled = teacher.label(trained_on, rows)
    # Unknown items are no candidates to survive.
    num_items = teacher.num_items - 1
    drawn = [rng.permutation(num_items)[:NUM_CANDIDATES] for _ in range(_count(held_out))]
    validation = teacher.label(held_out, np.array(drawn, np.int32))
    if not all(np.isfinite(part.scores).all() for part in (labelled, validation)):
        raise DataError(
            "some of the ranker's scores are not finite; look for extreme labels and train it anew."
        )
    _logger.info(
        "phase=label_candidates requests=%d seconds=%.1f",
        len(labelled.rows) + len(validation.rows),
        time.perf_counter() - start,
    )

    described = describe_items(ranker, items)
    student = PreRanker(labelled.queries.shape[1], described.shape[1], config)
    student.query_inputs.fit(labelled.queries)
    student.item_inputs.fit(described)
    log = _train(student, described, labelled, validation, config, rng)
    controls: Mapping[str, npt.NDArray[Any]] = {
        "same_for_all": mean_scores(labelled, len(popularity))[validation.rows],
        "popularity": popularity[validation.rows],
        "random": rng.random(validation.rows.shape),
    }
    found = {SURVIVAL: min(log, key=lambda record: record["eval_loss"])[SURVIVAL]}
    for name, scores in controls.items():
        key = metrics.metric_key("preranking", "survival", task=name, k=NUM_KEPT)
        found[key] = float(survival(validation.scores, scores).mean())
    return Distilled(student, log, found)


def _count(features: Features) -> int:
    return len(features[_USER_ID])


def _split_by_user(
    requests: Features, config: PrerankerConfig, rng: np.random.Generator
) -> tuple[Features, Features]:
    """Requests to distil on, and those of other users to measure survival on."""
    users = np.asarray(requests[_USER_ID])
    distinct = rng.permutation(np.unique(users))
    if len(distinct) < 2:
        raise DataError(
            f"the requests to distil the pre-ranker on are of {len(distinct)} user(s); expected two or more, "
            "one of them to judge it by."
        )
    num_held_out = min(config.num_validation_users, len(distinct) // 2)
    is_held_out = np.isin(users, distinct[:num_held_out])
    chosen = np.flatnonzero(~is_held_out)[: config.num_queries], np.flatnonzero(is_held_out)
    parts = [{name: np.asarray(column)[places] for name, column in requests.items()} for places in chosen]
    return parts[0], parts[1]


def _train(
    student: PreRanker,
    items: tf.Tensor,
    labelled: Labelled,
    validation: Labelled,
    config: PrerankerConfig,
    rng: np.random.Generator,
) -> list[dict[str, float]]:
    """Trains in place and leaves the weights of the best epoch; see `Distilled.log`."""
    count = len(labelled.rows)
    batch = min(config.batch_queries, count)
    steps = count // batch
    schedule = tf.keras.optimizers.schedules.CosineDecay(config.learning_rate, steps * config.max_epochs)
    step = _step(student, items, tf.keras.optimizers.Adam(schedule), config)
    log: list[dict[str, float]] = []
    best: list[np.ndarray] = []
    best_epoch, best_loss = 0, math.inf
    for epoch in range(1, config.max_epochs + 1):
        start = time.perf_counter()
        order = rng.permutation(count)[: steps * batch].reshape(steps, batch)
        losses = [step(*(tf.constant(column[rows]) for column in labelled)) for rows in order]
        scores = score_rows(student, student.precompute(items), validation)
        record = {
            "epoch": epoch,
            "seconds": time.perf_counter() - start,
            "train_loss": float(np.mean(losses)),
            "eval_loss": float(distillation_loss(validation.scores, scores, config)),
            SURVIVAL: float(survival(validation.scores, scores).mean()),
        }
        if not math.isfinite(record["train_loss"] + record["eval_loss"]):
            raise DataError(
                f"the loss of the pre-ranker in epoch {epoch} is {record['train_loss']}, and on other users "
                f"{record['eval_loss']}; lower its learning_rate."
            )
        log.append(record)
        _logger.info("phase=distil_preranker %s", " ".join(f"{k}={v:.5g}" for k, v in record.items()))
        if record["eval_loss"] < best_loss:
            best_epoch, best_loss, best = epoch, record["eval_loss"], student.get_weights()
        elif epoch - best_epoch >= config.patience_epochs:
            break
    student.set_weights(best)
    return log


def _step(
    student: PreRanker, items: tf.Tensor, optimizer: tf.keras.optimizers.Optimizer, config: PrerankerConfig
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    """One step of training: queries, rows and scores of a batch to its loss."""

    @tf.function(autograph=False)
    def step(queries: tf.Tensor, rows: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        # Popular items are candidates of many requests.
        distinct, places = tf.unique(tf.reshape(rows, [-1]))
        with tf.GradientTape() as tape:
            vectors = student.item_vectors(tf.gather(items, distinct))
            predicted = student.score(
                student.user_vectors(queries), vectors, tf.reshape(places, tf.shape(rows))
            )
            loss = distillation_loss(scores, predicted, config)
        weights = student.trainable_weights
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    return step


def score_rows(student: PreRanker, item_vectors: tf.Tensor, labelled: Labelled) -> FloatArray:
    """The pre-ranker's scores of the same candidates, float32 [U, N]."""
    step = max(1, _PAIRS // labelled.rows.shape[1])
    parts = []
    for start in range(0, len(labelled.rows), step):
        users = student.user_vectors(labelled.queries[start : start + step])
        parts.append(student.score(users, item_vectors, labelled.rows[start : start + step]).numpy())
    return np.concatenate(parts)
