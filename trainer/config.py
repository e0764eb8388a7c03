"""Typed settings of the two models. Values that differ from these defaults live in the run's YAML."""

from __future__ import annotations

from typing import Literal

import pydantic

from trainer.balancing_config import BalancingConfig
from trainer.body_config import BehaviourConfig, ExpertsConfig, InteractionConfig, PastConfig
from trainer.calibration_config import CalibrationConfig
from trainer.debiasing_config import PositionConfig
from trainer.features import HISTORY
from trainer.preranker_config import PrerankerConfig


class _Config(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class IndexConfig(_Config):
    """The candidate index inside the exported retrieval model.

    Attributes:
      kind: `scann`, or `exact` for exact search with stock TensorFlow operations: the exported model then
        loads into any model server and runs on GPUs, at the cost of scoring every item.
      min_recall: smallest share of the exact top k that ScaNN must find, for every k up to max_k; it is tuned
        to the least work that does, and an index that finds less is not exported.
      min_slice_recall: the same among head, torso, tail and cold items, each by itself, where the sample
        holds 30 exact results and more; the gate `validation.min_index_slice_recall` judges the outcome.
      allow_list: categorical or multi-categorical item features that requests may filter by; each adds the
        request input `allow_<feature>`.
    """

    kind: Literal["scann", "exact"] = "scann"
    min_recall: float = pydantic.Field(default=0.98, ge=0, le=1)
    min_slice_recall: float = pydantic.Field(default=0.93, ge=0, le=1)
    allow_list: tuple[str, ...] = ()


class LossConfig(_Config):
    """The softmax loss of the retrieval model and its negatives; the items of the batch always are negatives.

    Attributes:
      temperature: divides the scores in the loss.
      sampling_probability: where the chance of an item to be in a batch comes from: "counted" in the training
        data, or "streaming", estimated from the batches as they come.
      streaming_rate: weight of the newest interval in the streaming estimate.
      uniform_negatives: items drawn uniformly from the catalogue per step, with replacement; "all" for the
        softmax over the whole catalogue, which is exact and costs as much per step as encoding it.
      hard_negatives: items per query that the model ranks high and the user is not known to like, at most.
      hard_negative_skip: ranks above the hard negatives that are passed over, known positives not counted.
      hard_negative_search: neighbours of a query among which hard negatives are looked for.
      hard_negative_refresh_steps: steps between rebuilds of the index that hard negatives are found with.
    """

    temperature: float = pydantic.Field(default=1.0, gt=0)
    sampling_probability: Literal["counted", "streaming"] = "counted"
    streaming_rate: float = pydantic.Field(default=0.01, gt=0, le=1)
    uniform_negatives: pydantic.NonNegativeInt | Literal["all"] = 0
    hard_negatives: int = pydantic.Field(default=0, ge=0)
    hard_negative_skip: int = pydantic.Field(default=10, ge=0)
    hard_negative_search: int = pydantic.Field(default=100, ge=1)
    hard_negative_refresh_steps: int = pydantic.Field(default=100, ge=1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.hard_negative_skip + self.hard_negatives > self.hard_negative_search:
            raise ValueError(
                f"hard_negative_search is {self.hard_negative_search}, fewer than hard_negative_skip "
                f"{self.hard_negative_skip} + hard_negatives {self.hard_negatives}; raise it."
            )
        return self

    @property
    def needs_catalogue(self) -> bool:
        """Whether some negatives come from the catalogue and not from the batches."""
        return self.uniform_negatives != 0 or self.hard_negatives > 0


class HistoryConfig(_Config):
    """How the query tower reads the list of watched items.

    Attributes:
      encoder: "mean"; "attention", a mean weighted by item and recency; "transformer", a causal transformer
        over the events with a gate between its last state and the mean.
      interests: query vectors per user, each an attention pooling of its own; an item's score is the best of
        them. With 1, `encoder` decides.
      max_events: distinct distances, in events, that attention and transformer tell apart.
      attention_width: hidden width of the attention pooling.
      num_blocks: of the transformer.
      num_heads: of each block; the width of an item's embedding is a multiple of it.
      dropout_fraction: of the transformer.
    """

    encoder: Literal["mean", "attention", "transformer"] = "mean"
    interests: int = pydantic.Field(default=1, ge=1, le=8)
    max_events: int = pydantic.Field(default=200, ge=1)
    attention_width: int = pydantic.Field(default=32, ge=1)
    num_blocks: int = pydantic.Field(default=2, ge=1)
    num_heads: int = pydantic.Field(default=2, ge=1)
    dropout_fraction: float = pydantic.Field(default=0.2, ge=0, lt=1)


class FactorsConfig(_Config):
    """Item factors of a matrix factorisation (iALS), beside what the towers learn.

    A score is the sum of both. The factors are fitted to the training positives and stay as they are. The
    loss does not count them: they have seen the very positives that it learns from, and would be trusted too
    much.

    Attributes:
      weight: of the factors' part of a score; the towers' part is a log probability up to a constant.
      num_factors: dimensions that they add to query and candidate vectors.
      alpha: weight of a chosen item in the fit, that of the others being 1.
      ridge: of the fit; the larger, the fewer items and directions have factors that count.
    """

    weight: float = pydantic.Field(gt=0)
    alpha: float = pydantic.Field(gt=0)
    ridge: float = pydantic.Field(gt=0)
    num_factors: int = pydantic.Field(default=64, ge=1)


class RetrievalConfig(_Config):
    """The two-tower model.

    Attributes:
      embedding_dim: width of the query and candidate vectors, without the item-bias dimension.
      max_embedding_width: upper bound of the width of any feature's embedding.
      hidden_layers: widths of each tower's hidden layers.
      query_dropout_fraction: share of the query's ids, those of the history included, that are hidden in
        training; without it the model learns the order within a session, which does not help weeks later.
      item_id_dropout_fraction: share of item ids hidden in training, so that new items get a vector from
        their content.
      batch_size: examples per step, which is also the number of in-batch negatives plus one.
      learning_rate: Adagrad's.
      max_steps_per_epoch: steps between validations, at most; fewer when the data hold fewer batches.
      max_epochs: upper bound; training stops earlier when validation recall stops growing.
      patience_epochs: epochs without a better validation recall before training stops.
      loss: softmax and negatives.
      history: how the list of watched items is read.
      ignored_features: query and candidate features that the towers do not read, by raw name; user_id, which
        they never read, and item_id, which history and item bias go by, cannot be named.
      surfaces: surfaces whose watches the model is trained on; none named is all of them, not only those of
        recommendations (Covington et al. 2016, section 3.4).
      roll_back_to_session: whether an example's history ends where its session began, in datasets with
        session_gap_hours; else it ends with the event before.
      first_session_weight: weight of the examples whose history is empty for that reason.
      item_vectors: what item embeddings start from: "random", or "cooccurrence", the truncated SVD of users
        × items. In the latter case embeddings are embedding_dim wide and both towers add them to their
        output, so that the model starts as a matrix factorisation.
      factors: item factors that stay as they are, as further dimensions of the vectors; null has none.
      new_item_boost: added to the scores of items that training did not meet, in units of a log probability;
        by itself the model rates them, by their content, as items that were shown and not chosen.
      popularity_half_lives_days: half-lives of the recency-weighted popularities that the item bias reads, as
        of the day of each example and, at serving, as of the end of training.
      max_validation_users: users on whom recall is measured after each epoch, at most.
      max_k: the largest k that a request may ask for.
      warm_start: whether training starts from the last blessed model, whose rows are matched by vocabulary
        value, and not from random weights; the first run starts cold.
      seed: of initial weights and shuffling.
    """

    embedding_dim: int = pydantic.Field(default=64, ge=2)
    max_embedding_width: int = pydantic.Field(default=64, ge=4)
    hidden_layers: tuple[int, ...] = (128,)
    query_dropout_fraction: float = pydantic.Field(default=0.5, ge=0, lt=1)
    item_id_dropout_fraction: float = pydantic.Field(default=0.05, ge=0, lt=1)
    batch_size: int = pydantic.Field(default=1024, ge=2)
    learning_rate: float = pydantic.Field(default=0.005, ge=0)
    max_steps_per_epoch: int = pydantic.Field(default=100, ge=1)
    max_epochs: int = pydantic.Field(default=30, ge=1)
    patience_epochs: int = pydantic.Field(default=3, ge=1)
    loss: LossConfig = LossConfig()
    history: HistoryConfig = HistoryConfig()
    ignored_features: tuple[str, ...] = ()
    surfaces: tuple[str, ...] = ()
    roll_back_to_session: bool = True
    first_session_weight: float = pydantic.Field(default=1.0, ge=0)
    item_vectors: Literal["random", "cooccurrence"] = "random"
    factors: FactorsConfig | None = None
    new_item_boost: float = pydantic.Field(default=0.0, ge=0)
    popularity_half_lives_days: tuple[pydantic.PositiveFloat, ...] = ()
    max_validation_users: int = pydantic.Field(default=20_000, ge=1)
    max_k: int = pydantic.Field(default=500, ge=1)
    warm_start: bool = False
    index: IndexConfig = IndexConfig()
    seed: int = 42

    @pydantic.model_validator(mode="after")
    def _check(self) -> RetrievalConfig:
        if self.history.interests > 1 and self.loss.hard_negatives:
            raise ValueError(
                f"history.interests is {self.history.interests}, but loss.hard_negatives are looked for with "
                "one query vector per user; set one of them to its default"
            )
        if HISTORY in self.ignored_features:
            for setting, is_set, default in (
                ("factors", self.factors is not None, "null"),
                ("loss.hard_negatives", self.loss.hard_negatives > 0, "0"),
                ("history.interests", self.history.interests > 1, "1"),
            ):
                if is_set:
                    raise ValueError(
                        f"{setting} needs a user's history, but ignored_features names {HISTORY}; set "
                        f"{setting} to {default}"
                    )
        return self


class RankingConfig(_Config):
    """The multi-task ranker.

    Attributes:
      max_embedding_width: upper bound of the width of any feature's embedding.
      batch_size: examples per step.
      learning_rate: Adam's.
      max_epochs: upper bound; training stops earlier when the validation loss stops falling.
      patience_epochs: epochs without a lower validation loss before training stops.
      id_dropout_fraction: share of the ids (user, item, creator, ...) that training reads as unknown; teaches
        the model what to say about ids it has never met, and not to learn known ids by heart.
      ignored_features: query and candidate features that are no inputs of their own, by raw name. What else
        is made of them stays: the product of the item's embedding with the history's, the user's past by
        item, key and surface, counters, and the crosses and slices that name them.
      item_vectors: what item embeddings start from: "random", or "cooccurrence", the vectors that retrieval
        starts from too, at the width of the ranker's item embeddings.
      crosses: pairs of a query and a candidate feature, by raw name, whose combinations get embeddings of
        their own; a continuous feature counts by its quantile bucket.
      past: what is counted of the user's impressions.
      interaction: products of features.
      experts: how the tasks share the body.
      behaviour: how a candidate is matched with the user's impressions.
      position: what is done about the position at which an item was shown; the dataset maps `position`.
      propensity_clip: largest inverse propensity with which a training row counts; null counts all rows
        alike. The dataset maps `propensity`.
      negative_rate: share of the training rows to keep that are negative in every binary task; what is kept
        of them counts that much more.
      balancing: how the losses of the tasks are summed.
      calibration: of the outputs, on the eval split.
      preranker: a small network that cuts thousands of candidates to the hundreds that the ranker scores,
        distilled from it after training and exported with it as `pre_rank`; null exports none.
      seed: of initial weights and shuffling.
    """

    max_embedding_width: int = pydantic.Field(default=16, ge=4)
    batch_size: int = pydantic.Field(default=1024, ge=1)
    learning_rate: float = pydantic.Field(default=5e-4, ge=0)
    max_epochs: int = pydantic.Field(default=10, ge=1)
    patience_epochs: int = pydantic.Field(default=1, ge=1)
    id_dropout_fraction: float = pydantic.Field(default=0.1, ge=0, lt=1)
    ignored_features: tuple[str, ...] = ()
    item_vectors: Literal["random", "cooccurrence"] = "random"
    crosses: tuple[tuple[str, str], ...] = ()
    past: PastConfig = PastConfig()
    interaction: InteractionConfig = InteractionConfig()
    experts: ExpertsConfig = ExpertsConfig()
    behaviour: BehaviourConfig = BehaviourConfig()
    position: PositionConfig = PositionConfig()
    propensity_clip: float | None = pydantic.Field(default=None, ge=1)
    negative_rate: float = pydantic.Field(default=1.0, gt=0, le=1)
    balancing: BalancingConfig = BalancingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    preranker: PrerankerConfig | None = None
    seed: int = 42
