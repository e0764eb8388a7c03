"""Typed settings of the two models. Values that differ from these defaults live in the run's YAML."""

from __future__ import annotations

import pydantic


class _Config(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class IndexConfig(_Config):
    """The candidate index inside the exported retrieval model; names are those of the ScaNN library.

    Attributes:
      min_recall: smallest share of the exact top max_k that ScaNN must find; the search effort grows until it does.
    """

    min_recall: float = pydantic.Field(default=0.95, ge=0, le=1)


class RetrievalConfig(_Config):
    """The two-tower model.

    Attributes:
      embedding_dim: width of the query and candidate vectors, without the item-bias dimension.
      max_embedding_width: upper bound of the width of any feature's embedding.
      hidden_layers: widths of each tower's hidden layers.
      id_dropout_fraction: share of user and item ids replaced by the out-of-vocabulary id in training, so that
        unknown users and new items get a vector from everything else that is known of them.
      batch_size: examples per step, which is also the number of in-batch negatives plus one.
      learning_rate: Adagrad's.
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
    id_dropout_fraction: float = pydantic.Field(default=0.05, ge=0, lt=1)
    batch_size: int = pydantic.Field(default=1024, ge=2)
    learning_rate: float = pydantic.Field(default=0.05, ge=0)
    max_epochs: int = pydantic.Field(default=10, ge=1)
    patience_epochs: int = pydantic.Field(default=2, ge=1)
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
      unknown_fraction: share of the ids (user, item, creator, ...) that training reads as unknown; teaches the model
        what to say about ids it has never met, and not to learn known ids by heart.
      seed: of initial weights and shuffling.
    """

    max_embedding_width: int = pydantic.Field(default=16, ge=4)
    hidden_layers: tuple[int, ...] = (128, 64)
    batch_size: int = pydantic.Field(default=1024, ge=1)
    learning_rate: float = pydantic.Field(default=1e-3, ge=0)
    max_epochs: int = pydantic.Field(default=5, ge=1)
    patience_epochs: int = pydantic.Field(default=1, ge=1)
    dropout_fraction: float = pydantic.Field(default=0.1, ge=0, lt=1)
    unknown_fraction: float = pydantic.Field(default=0.1, ge=0, lt=1)
    seed: int = 42
