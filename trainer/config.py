"""Typed settings of the two models. Values that differ from these defaults live in the run's YAML."""

from __future__ import annotations

import pydantic


class _Config(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class IndexConfig(_Config):
    """The candidate index inside the exported retrieval model; names are those of the ScaNN library.

    Attributes:
      min_recall: smallest share of the exact top max_k that ScaNN must find; effort grows until it does.
    """

    min_recall: float = pydantic.Field(default=0.95, ge=0, le=1)


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
      temperature: divides the scores in the loss.
      max_validation_users: users on whom recall is measured after each epoch, at most.
      max_k: the largest k that a request may ask for.
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
    temperature: float = pydantic.Field(default=1.0, gt=0)
    max_validation_users: int = pydantic.Field(default=20_000, ge=1)
    max_k: int = pydantic.Field(default=500, ge=1)
    index: IndexConfig = IndexConfig()
    seed: int = 42


class RankingConfig(_Config):
    """The multi-task ranker.

    Attributes:
      max_embedding_width: upper bound of the width of any feature's embedding.
      hidden_layers: widths of the shared body.
      batch_size: examples per step.
      learning_rate: Adam's.
      max_epochs: upper bound; training stops earlier when the validation loss stops falling.
      patience_epochs: epochs without a lower validation loss before training stops.
      dropout_fraction: share of each body layer's inputs set to zero in training.
      id_dropout_fraction: share of the ids (user, item, creator, ...) that training reads as unknown; teaches
        the model what to say about ids it has never met, and not to learn known ids by heart.
      seed: of initial weights and shuffling.
    """

    max_embedding_width: int = pydantic.Field(default=16, ge=4)
    hidden_layers: tuple[int, ...] = (128, 64)
    batch_size: int = pydantic.Field(default=1024, ge=1)
    learning_rate: float = pydantic.Field(default=5e-4, ge=0)
    max_epochs: int = pydantic.Field(default=10, ge=1)
    patience_epochs: int = pydantic.Field(default=1, ge=1)
    dropout_fraction: float = pydantic.Field(default=0.1, ge=0, lt=1)
    id_dropout_fraction: float = pydantic.Field(default=0.1, ge=0, lt=1)
    seed: int = 42
