"""Settings of the ranker's body: what it reads of the user's past, interactions, experts, attention."""

from __future__ import annotations

from typing import Literal

import pydantic


class _Config(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class PastConfig(_Config):
    """What is counted of the user's impressions that have something in common with the candidate.

    Attributes:
      key_windows: whether those of the same item, creator or tag are counted in each window of the dataset's
        counters too; else over all time only.
      churn: whether the impressions of the item itself since the user's last positive of it are counted, all
        of them where there was none: what was shown and passed over. The key item_id must be among the
        dataset's counters, and its positive label among its tasks.
      contexts: whether the labels of impressions are compared with those usual on their surface for their
        duration, not only with everybody's, and impressions of items about as long as the candidate are
        counted too.
    """

    key_windows: bool = False
    churn: bool = False
    contexts: bool = False


class InteractionConfig(_Config):
    """Products of features, which a network of dense layers finds hard to learn.

    Attributes:
      kind: "none"; "dcn", crosses with full matrices; "dcn_low_rank", crosses with matrices of a low rank;
        "dlrm", the dot products of all pairs of features.
      structure: "stacked", the body reads the interactions; "parallel", the body reads the features, and the
        heads read the interactions beside the body.
      num_layers: crosses, of "dcn" and "dcn_low_rank"; the degree of the products is one more.
      rank: of the matrices of "dcn_low_rank"; less than half of the features' total width, else they would be
        larger than full ones.
      projection_width: width that "dlrm" brings every feature to, since dot products need equal ones.
    """

    kind: Literal["none", "dcn", "dcn_low_rank", "dlrm"] = "dcn"
    structure: Literal["stacked", "parallel"] = "parallel"
    num_layers: pydantic.PositiveInt = 2
    rank: pydantic.PositiveInt = 32
    projection_width: pydantic.PositiveInt = 16


class ExpertsConfig(_Config):
    """How the tasks share the body.

    Attributes:
      kind: "shared_bottom", one network for all tasks; "mmoe", several experts that each task weighs by its
        own gate; "ple", experts of each task besides shared ones, in several levels.
      hidden_layers: widths of the shared bottom, or of every expert; the experts of "ple" have as many layers
        in every level.
      task_layers: widths of the network that each task has of its own, between the shared part and its head.
      num_experts: of "mmoe".
      task_experts: of "ple", per task and level.
      shared_experts: of "ple", per level.
      num_levels: of "ple". In the last level no task reaches another's experts; in those before, the shared
        gate mixes the experts of all tasks.
      dropout_fraction: share of each hidden layer's inputs set to zero in training.
      gate_dropout_fraction: share of the experts that a gate may not use for a row in training; the others
        share their weight. Keeps a gate from relying on one expert.
    """

    kind: Literal["shared_bottom", "mmoe", "ple"] = "shared_bottom"
    hidden_layers: tuple[pydantic.PositiveInt, ...] = (128, 64)
    task_layers: tuple[pydantic.PositiveInt, ...] = ()
    num_experts: pydantic.PositiveInt = 4
    task_experts: pydantic.PositiveInt = 1
    shared_experts: pydantic.PositiveInt = 2
    num_levels: pydantic.PositiveInt = 2
    dropout_fraction: float = pydantic.Field(default=0.1, ge=0, lt=1)
    gate_dropout_fraction: float = pydantic.Field(default=0.0, ge=0, lt=1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> ExpertsConfig:
        if self.kind != "shared_bottom" and not self.hidden_layers:
            raise ValueError(
                f"hidden_layers is empty, which leaves the experts of {self.kind!r} no layer; name at least "
                "one width, or set kind to 'shared_bottom'"
            )
        return self


class BehaviourConfig(_Config):
    """How a candidate is matched with the user's history.

    Attributes:
      kind: "mean" of the events, whatever the candidate is; "din", a sum of the events that a network weighs
        by how each goes with the candidate; "transformer", in which the candidate attends to the events and
        these to each other.
      max_events: latest events that are read; older ones are passed over.
      attention_layers: hidden widths of the network of "din" that weighs an event.
      softmax: whether the weights of "din" are positive and sum to one; else their sum tells how much of the
        history goes with the candidate.
      causal: whether an event of "transformer" sees only itself and those before it; else all.
      num_blocks: of "transformer"; with 1 the candidate sees the events as they are, with more it also sees
        what they say about each other.
      num_heads: of each block; the width of an item's embedding is a multiple of it.
      dropout_fraction: of "transformer".
    """

    kind: Literal["mean", "din", "transformer"] = "mean"
    max_events: pydantic.PositiveInt = 50
    attention_layers: tuple[pydantic.PositiveInt, ...] = pydantic.Field(default=(32,), min_length=1)
    softmax: bool = False
    causal: bool = True
    num_blocks: pydantic.PositiveInt = 2
    num_heads: pydantic.PositiveInt = 2
    dropout_fraction: float = pydantic.Field(default=0.1, ge=0, lt=1)
