"""Which items the softmax of a training step is over, and how likely each was to be among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import tensorflow as tf

from schema.contract import FeatureKind
from schema.errors import ConfigError
from trainer import features
from trainer.catalogue import Catalogue
from trainer.hard_negatives import HardNegativeMiner
from trainer.index import NO_ROW
from trainer.losses import NOT_SAMPLED, log_inclusion_probability
from trainer.sampling_probability import SamplingProbability

_ITEM_ID = features.Feature(features.ITEM_ID, FeatureKind.CATEGORICAL, features.ITEM_SPACE).id_name

Encode = Callable[[Mapping[str, tf.Tensor]], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class CandidateSet:
    """The distinct items of a step; the arguments of `trainer.losses.sampled_softmax_loss`.

    Letters: B = positives of the batch, C = items of the set, H = hard negatives per query, D = vector width.

    Attributes:
      item_ids: int32 [C], transformed.
      vectors: float32 [C, D].
      positives: int32 [B], the column of each query's positive.
      log_weights: float32 [C].
      hard_negatives: int32 [B, H], columns; None without mining.
    """

    item_ids: tf.Tensor
    vectors: tf.Tensor
    positives: tf.Tensor
    log_weights: tf.Tensor
    hard_negatives: tf.Tensor | None


class CataloguePool:
    """The items of the catalogue that occur in the training data, to draw negatives from.

    An item that came later never is a positive: as a negative it would only be learnt to be bad.
    """

    def __init__(self, catalogue: Catalogue, num_ids: int, num_draws: int | Literal["all"]) -> None:
        """Makes the pool.

        Args:
          catalogue: every item.
          num_ids: ids of the item vocabulary, padding and OOV included.
          num_draws: uniform draws per step, with replacement; "all" takes every item.

        Raises:
          ConfigError: no item of the catalogue occurs in the training data.
        """
        ids = catalogue.transformed[_ITEM_ID]
        rows = np.flatnonzero(ids >= features.FIRST_VOCABULARY_ID)
        if len(rows) == 0:
            raise ConfigError("no item of the catalogue occurs in the training data; check both tables' ids.")
        self.item_ids = tf.constant(ids[rows], tf.int32)
        row_of_id = np.full(num_ids, NO_ROW)
        row_of_id[ids[rows]] = rows
        self.row_of_id = tf.constant(row_of_id, tf.int32)
        self.columns = {
            name: tf.constant(column.astype(np.int32) if column.dtype == np.int64 else column)
            for name, column in catalogue.transformed.items()
        }
        self.num_draws = num_draws

    def draw(self) -> tf.Tensor:
        """Transformed item ids int32 [M]."""
        if self.num_draws == "all":
            return self.item_ids
        draws = tf.random.uniform([self.num_draws], maxval=len(self.item_ids), dtype=tf.int32)
        return tf.gather(self.item_ids, draws)

    def log_absence(self, item_ids: tf.Tensor) -> tf.Tensor:
        """Log of the chance that no draw shows the item: float32, -inf when all are drawn."""
        absence = 0.0 if self.num_draws == "all" else (1 - 1 / len(self.item_ids)) ** self.num_draws
        in_pool = tf.gather(self.row_of_id, item_ids) != NO_ROW
        # In float64, as 1 - 1/I is 1 in float32 when there are many items.
        log_absence = tf.cast(tf.math.log(tf.constant(absence, tf.float64)), tf.float32)
        return tf.where(in_pool, log_absence, 0.0)

    def features(self, item_ids: tf.Tensor) -> dict[str, tf.Tensor]:
        """Transformed candidate features of items of the pool."""
        rows = tf.gather(self.row_of_id, item_ids)
        return {name: tf.gather(column, rows) for name, column in self.columns.items()}


class CandidateSampler:
    """Puts the set of a step together.

    The set is the union of the batch's positives, uniform draws from the catalogue, and hard negatives; the
    latter two are optional. An item in several of them is one candidate. Its features are those of one of its
    examples in the batch, or else those of the catalogue.
    """

    def __init__(
        self,
        candidate_names: Sequence[str],
        probability: SamplingProbability,
        pool: CataloguePool | None = None,
        miner: HardNegativeMiner | None = None,
    ) -> None:
        """Makes the sampler.

        Args:
          candidate_names: transformed features that the candidate tower reads.
          probability: of the items in the batch.
          pool: for uniform and hard negatives; neither when absent.
          miner: looks for hard negatives, which the pool must be able to encode; none when absent.
        """
        self.candidate_names = candidate_names
        self.probability = probability
        self.pool = pool
        self.miner = miner

    def sample(
        self, inputs: Mapping[str, tf.Tensor], queries: tf.Tensor, encode: Encode, training: bool
    ) -> CandidateSet:
        """Chooses and encodes the items of a step.

        Args:
          inputs: transformed features of B positives.
          queries: float32 [B, D], their query vectors.
          encode: the candidate tower.
          training: whether the sampling probabilities learn from the batch.
        """
        batch_ids = tf.cast(inputs[_ITEM_ID], tf.int32)
        batch_size = tf.size(batch_ids)
        if training:
            self.probability.observe(batch_ids)
        uniform_ids = self.pool.draw() if self.pool else tf.zeros([0], tf.int32)
        hard_ids = self.miner.mine(queries, inputs) if self.miner else tf.zeros([batch_size, 0], tf.int32)
        # In order of first occurrence: the set begins with the items of the batch.
        ids, columns = tf.unique(tf.concat([batch_ids, uniform_ids, tf.reshape(hard_ids, [-1])], axis=0))
        num_candidates, num_drawn = tf.size(ids), batch_size + tf.size(uniform_ids)
        place = tf.math.unsorted_segment_min(tf.range(tf.size(columns)), columns, num_candidates)
        in_batch = place < batch_size
        examples = tf.boolean_mask(place, in_batch)
        vectors = encode({name: tf.gather(inputs[name], examples) for name in self.candidate_names})
        # The place of the positive itself is no draw. A batch of one has loss 0 with any finite chance.
        num_others = tf.cast(tf.maximum(batch_size - 1, 1), tf.float32)
        log_absence = num_others * self.probability.log_absence(ids)
        if self.pool:
            others = encode(self.pool.features(tf.boolean_mask(ids, ~in_batch)))
            vectors = tf.concat([vectors, others], axis=0)
            log_absence += self.pool.log_absence(ids)
        return CandidateSet(
            ids,
            vectors,
            columns[:batch_size],
            tf.where(place < num_drawn, -log_inclusion_probability(log_absence), NOT_SAMPLED),
            tf.reshape(columns[num_drawn:], tf.shape(hard_ids)) if self.miner else None,
        )
