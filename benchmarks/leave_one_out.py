"""The causal transformer of the query tower under the leave-one-out protocol of the sequence-model papers.

    .venv/bin/python -m benchmarks.leave_one_out --data-dir DIR --seeds 5 --out loo.json

Every position of a user's sequence is a training example: its state times the item vectors gives the softmax
over all items (`trainer.losses.sampled_softmax_loss` with the whole catalogue as candidates). Chosen on the
validation item, reported on the test item, all items ranked, those of the history excluded.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
import tensorflow as tf

from benchmarks.protocols import LeaveOneOut, leave_one_out, leave_one_out_metrics, load_tables
from benchmarks.seeds import summary
from trainer.config import HistoryConfig
from trainer.history import CausalTransformer
from trainer.losses import sampled_softmax_loss

_WARM_UP_STEPS = 200
_FINAL_LEARNING_RATE_SHARE = 0.02
_MAX_GRADIENT_NORM = 5.0
_METRIC = "hit_rate_at_10"


class SequenceModel(tf.keras.Model):
    """One table of item vectors, read by the transformer and multiplied with its states."""

    def __init__(self, config: HistoryConfig, num_items: int, width: int) -> None:
        """Makes the model; row 0 of the table is padding, item i is row i + 1."""
        super().__init__()
        self.items = self.add_weight(
            "items", [num_items + 1, width], initializer=tf.keras.initializers.RandomNormal(stddev=0.02)
        )
        self.bias = self.add_weight("bias", [num_items], initializer="zeros")
        self.transformer = CausalTransformer(config, width, has_times=True)
        self.max_events = config.max_events

    def call(self, items: tf.Tensor, times_s: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Rows of the table int32 [B, L] and seconds int32 [B, L] to states float32 [B, L, W]."""
        return self.transformer(tf.gather(self.items, items), times_s, training=training)

    def loss_of(self, items: tf.Tensor, times_s: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Mean softmax loss of the next items, int32 [B, L], -1 where there is none."""
        places = tf.where(targets >= 0)
        states = tf.gather_nd(self(items, times_s, training=True), places)
        candidates = tf.concat([self.items[1:], self.bias[:, tf.newaxis]], axis=1)
        return sampled_softmax_loss(
            tf.concat([states, tf.ones_like(states[:, :1])], axis=1),
            candidates,
            tf.gather_nd(targets, places),
            tf.zeros_like(self.bias),
        )

    def scores(self, items: tf.Tensor, times_s: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """Scores of all items after the last event of each sequence, float32 [B, I]."""
        last = tf.gather(self(items, times_s), lengths - 1, batch_dims=1)
        return tf.matmul(last, self.items[1:], transpose_b=True) + self.bias


def padded(sequences: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(items, times) pairs to table rows and seconds, int32 [B, L], padded on the right."""
    longest = max(len(items) for items, _ in sequences)
    rows = np.zeros((len(sequences), longest), np.int32)
    seconds = np.zeros((len(sequences), longest), np.int32)
    for place, (items, times) in enumerate(sequences):
        rows[place, : len(items)] = items + 1
        seconds[place, : len(items)] = times
        seconds[place, len(items) :] = times[-1]
    return rows, seconds


def training_batches(
    data: LeaveOneOut, max_events: int, events_per_batch: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One pass over the users: (items, times, next items) of windows of about equal length.

    A sequence longer than `max_events` gives a random window, and two when it is half as long again.
    """
    windows = []
    for user in range(len(data.user_ids)):
        items, times = data.train(user), data.times_unix_s[user][:-2]
        spare = len(items) - (max_events + 1)
        for _ in range(1 if spare <= max_events // 2 else 2):
            start = int(generator.integers(spare + 1)) if spare > 0 else 0
            chosen = slice(start, start + max_events + 1)
            if len(items[chosen]) > 1:
                windows.append((items[chosen], times[chosen]))
    windows.sort(key=lambda window: len(window[0]) + 8 * generator.random())
    batches: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]
    for window in windows:
        if batches[-1] and (len(batches[-1]) + 1) * (len(window[0]) - 1) > events_per_batch:
            batches.append([])
        batches[-1].append(window)
    for number in generator.permutation(len(batches)):
        batch = batches[number]
        rows, seconds = padded([(items[:-1], times[:-1]) for items, times in batch])
        targets = np.full(rows.shape, -1, np.int32)
        for place, (items, _) in enumerate(batch):
            targets[place, : len(items) - 1] = items[1:]
        yield rows, seconds, targets


def evaluate(model: SequenceModel, data: LeaveOneOut, split: str) -> dict[str, float]:
    """Mean HR@10 and NDCG@10 over users."""
    signature = [tf.TensorSpec([None, None], tf.int32)] * 2 + [tf.TensorSpec([None], tf.int32)]
    scores = tf.function(model.scores, input_signature=signature, autograph=False)

    def score(users: np.ndarray) -> np.ndarray:
        histories = []
        for user in users:
            items = data.history(user, split)
            times = data.times_unix_s[user][: len(items)]
            histories.append((items[-model.max_events :], times[-model.max_events :]))
        lengths = np.array([len(items) for items, _ in histories], np.int32)
        return scores(*padded(histories), lengths).numpy()

    measured = leave_one_out_metrics(data, score, split)
    return {name: float(values.mean()) for name, values in measured.items()}


def train(
    data: LeaveOneOut,
    config: HistoryConfig,
    width: int,
    learning_rate: float,
    epochs: int,
    events_per_batch: int,
    epochs_per_validation: int,
    seed: int,
) -> dict[str, Any]:
    """Trains for `epochs` passes; the learning rate falls to nearly 0 by their end (half a cosine).

    Returns:
      The curve, one dict per validation, and the test metrics of the weights that were best on validation.
    """
    tf.keras.utils.set_random_seed(seed)
    generator = np.random.default_rng(seed)
    model = SequenceModel(config, len(data.item_ids), width)
    model(np.zeros((1, 2), np.int32), np.zeros((1, 2), np.int32))
    optimizer = tf.keras.optimizers.legacy.Adam(learning_rate, beta_2=0.98)
    matrix = tf.TensorSpec([None, None], tf.int32)

    @tf.function(input_signature=[matrix, matrix, matrix, tf.TensorSpec([], tf.float32)], autograph=False)
    def step(items: tf.Tensor, times_s: tf.Tensor, targets: tf.Tensor, rate: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = model.loss_of(items, times_s, targets)
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients, _ = tf.clip_by_global_norm(
            [tf.convert_to_tensor(gradient) for gradient in gradients], _MAX_GRADIENT_NORM
        )
        optimizer.learning_rate.assign(rate)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    trained_s, processor_s = 0.0, time.process_time()
    curve: list[dict[str, float]] = []
    best_weights = model.get_weights()
    steps = 0
    for epoch in range(1, epochs + 1):
        began = time.monotonic()
        losses = []
        batches = list(training_batches(data, config.max_events, events_per_batch, generator))
        for number, batch in enumerate(batches):
            cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 1 + number / len(batches)) / epochs))
            rate = (
                learning_rate * max(_FINAL_LEARNING_RATE_SHARE, cosine) * min(1, (steps + 1) / _WARM_UP_STEPS)
            )
            losses.append(float(step(*batch, rate)))
            steps += 1
        trained_s += time.monotonic() - began
        if epoch % epochs_per_validation == 0 or epoch in (1, epochs):
            measured = evaluate(model, data, "validation")
            curve.append({"epoch": epoch, "loss": float(np.mean(losses)), "train_s": trained_s, **measured})
            click.echo(
                f"seed {seed}  epoch {epoch}/{epochs}  loss {curve[-1]['loss']:.3f}  {trained_s:.0f} s  "
                + "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
            )
            if curve[-1][_METRIC] >= max(point[_METRIC] for point in curve):
                best_weights = model.get_weights()
    model.set_weights(best_weights)
    best = max(curve, key=lambda point: (point[_METRIC], point["epoch"]))
    return {
        "seed": seed,
        "validation": best,
        "test": evaluate(model, data, "test"),
        "train_s": trained_s,
        "processor_s": time.process_time() - processor_s,
        "curve": curve,
    }


@click.command()
@click.option("--dataset", default="movielens-1m", show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of the official archive.")
@click.option(
    "--work-dir", type=click.Path(path_type=Path), default=Path("runs/benchmarks"), show_default=True
)
@click.option(
    "--epochs", type=click.IntRange(1), default=14, show_default=True, help="Passes over the users."
)
@click.option("--width", default=64, show_default=True)
@click.option("--blocks", default=2, show_default=True)
@click.option("--heads", default=2, show_default=True)
@click.option("--dropout", default=0.2, show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--events-per-batch", default=2_000, show_default=True)
@click.option("--epochs-per-validation", default=2, show_default=True)
@click.option("--max-users", type=int, help="Fewer users, for a quick look.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of trainings.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first of them.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
def main(
    dataset: str,
    data_dir: Path | None,
    work_dir: Path,
    epochs: int,
    width: int,
    blocks: int,
    heads: int,
    dropout: float,
    learning_rate: float,
    events_per_batch: int,
    epochs_per_validation: int,
    max_users: int | None,
    seeds: int,
    first_seed: int,
    out: Path,
) -> None:
    """Trains and judges the causal transformer, leave-one-out.

    The file is written anew after each seed.

    Example: python -m benchmarks.leave_one_out --data-dir data --seeds 5 --out loo.json
    """
    data = leave_one_out(load_tables(dataset, data_dir, work_dir))
    if max_users:
        data = data.first(max_users)
    config = HistoryConfig(
        encoder="transformer", num_blocks=blocks, num_heads=heads, dropout_fraction=dropout, max_events=200
    )
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in click.get_current_context().params.items()
    }
    runs = []
    for seed in range(first_seed, first_seed + seeds):
        run = train(data, config, width, learning_rate, epochs, events_per_batch, epochs_per_validation, seed)
        runs.append(run)
        result = {"settings": settings, "summary": summary([run["test"] for run in runs]), "runs": runs}
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.replace(out)
        click.echo(json.dumps({"seed": seed, "test": run["test"], "train_s": run["train_s"]}))
    click.echo(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
