"""What the models answer, as typed results. Imports no TensorFlow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from schema.errors import ServingError
from serving.transport import Prediction

# Outputs of the ranker and of the one-call model that are no task.
_NO_TASKS: Final = frozenset(
    {
        "item_ids", "score", "item_is_known", "retrieval_score", "reason_item_ids", "user_is_known",
        "history_length", "exact_fallback",
    }
)  # fmt: skip
# Of a sum in float32; weights in the wrong columns are off by more.
_SCORE_TOLERANCE: Final = 1e-4


@dataclass(frozen=True)
class Candidate:
    """One retrieved item; `reason_item_id` is the watched item nearest to it, "" without history."""

    item_id: str
    retrieval_score: float
    reason_item_id: str


@dataclass(frozen=True)
class Retrieval:
    """Candidates, best first, and what is known about the user and the search.

    `exact_fallback`: approximate search found too few, so that every item was scored. `model_version` is None
    over REST, whose answers do not tell it.
    """

    candidates: tuple[Candidate, ...]
    user_is_known: bool
    history_length: int
    model_version: int | None
    exact_fallback: bool = False


@dataclass(frozen=True)
class RankedItem:
    """One scored item: the final score and the output per task."""

    item_id: str
    score: float
    predictions: Mapping[str, float]
    item_is_known: bool


@dataclass(frozen=True)
class Recommendation:
    """One recommended item; `rank` starts at 1, `item_is_known`: the ranker's catalogue has it."""

    item_id: str
    rank: int
    retrieval_score: float
    reason_item_id: str
    predictions: Mapping[str, float]
    score: float
    item_is_known: bool


@dataclass(frozen=True)
class Recommendations:
    """Recommended items, best first, and what is known about the user and the search.

    `model_versions` maps model name to the version that answered; it is empty over REST, whose answers do not
    tell it. `exact_fallback`: see Retrieval. `mismatch` names what the models that answered do not share
    (such as `catalogue`), "" where they come from one run or do not tell. `stage_seconds` maps each stage of
    the call (`funnel`, or `retrieve`, `pre_rank` if it was asked, and `rank`) to what it took the client,
    retries included.
    """

    items: tuple[Recommendation, ...]
    user_is_known: bool
    history_length: int
    model_versions: Mapping[str, int]
    exact_fallback: bool = False
    mismatch: str = ""
    stage_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict, compare=False)


def parse_retrieval(answer: Prediction, source: str) -> Retrieval:
    """Reads the answer of a retrieval model to one query.

    Args:
      answer: of a batch of one.
      source: names server and model in errors.

    Raises:
      ServingError: an answer that breaks the signature's contract.
    """
    item_ids, scores, reasons = _columns(answer, ("item_ids", "scores", "reason_item_ids"), source)
    return Retrieval(
        candidates=tuple(
            Candidate(item_id, score, reason)
            for item_id, score, reason in zip(item_ids, scores, reasons, strict=True)
            if item_id  # "" pads a short list
        ),
        user_is_known=bool(_row(answer, "user_is_known", source)),
        history_length=int(_row(answer, "history_length", source)),
        model_version=answer.version,
        exact_fallback=bool(_row(answer, "exact_fallback", source)),
    )


def parse_ranking(answer: Prediction, item_ids: Sequence[str], source: str) -> list[RankedItem]:
    """Reads the answer of a ranking model to one query with these candidates; see parse_retrieval.

    Its first column is that of the missing value that every list begins with. It may be longer than the
    candidates: a server that batches pads them to those of the longest request.
    """
    scores, known = (column[1:] for column in _columns(answer, ("score", "item_is_known"), source))
    tasks = {task: column[1:] for task, column in _tasks(answer, source).items()}
    if any(len(column) < len(item_ids) for column in (scores, *tasks.values())) or any(
        map(math.isnan, scores[: len(item_ids)])
    ):
        raise ServingError(f"{source} must give one number per candidate; check the model")
    return [
        RankedItem(item_id, scores[i], {task: column[i] for task, column in tasks.items()}, bool(known[i]))
        for i, item_id in enumerate(item_ids)
    ]


def parse_pre_ranking(answer: Prediction, source: str) -> tuple[list[str], int]:
    """Reads which items a pre-ranker prefers, and how many the ranker should get; see parse_retrieval."""
    # "" pads a short list, and is what the candidates begin with.
    item_ids = [item_id for item_id in _row(answer, "item_ids", source) if item_id]
    return item_ids, int(_row(answer, "num_kept", source))


def parse_tasks(answer: Prediction, source: str) -> dict[str, float]:
    """Reads the declared weight of each task, in the order of their columns; see parse_retrieval."""
    tasks, weights = (answer.outputs.get(name) for name in ("tasks", "weights"))
    if not isinstance(tasks, list) or not isinstance(weights, list) or len(tasks) != len(weights):
        raise ServingError(f"{source} must tell a weight for each task; check the model")
    return {task: weight for task, weight in zip(tasks, weights, strict=True) if task}


def follows_weights(items: Iterable[RankedItem | Recommendation], weights: Mapping[str, float]) -> bool:
    """Whether every score is the sum of the predictions by these weights, given by task."""
    for item in items:
        parts = [weight * item.predictions.get(task, math.nan) for task, weight in weights.items()]
        if not abs(item.score - sum(parts)) <= _SCORE_TOLERANCE * (1.0 + sum(map(abs, parts))):
            return False
    return True


def parse_funnel(answer: Prediction, model: str, source: str) -> Recommendations:
    """Reads the answer of a model that retrieves and ranks to one query; see parse_retrieval."""
    names = ("item_ids", "score", "retrieval_score", "reason_item_ids", "item_is_known")
    item_ids, scores, retrieval_scores, reasons, known = _columns(answer, names, source)
    tasks = _tasks(answer, source)
    if any(len(column) != len(item_ids) for column in tasks.values()) or any(map(math.isnan, scores)):
        raise ServingError(f"{source} must give one number per item; check the model")
    return Recommendations(
        items=tuple(
            Recommendation(
                item_id=item_id,
                rank=i + 1,
                retrieval_score=retrieval_scores[i],
                reason_item_id=reasons[i],
                predictions={task: column[i] for task, column in tasks.items()},
                score=scores[i],
                item_is_known=bool(known[i]),
            )
            for i, item_id in enumerate(item_ids)
            if item_id  # "" pads a short list, at its end
        ),
        user_is_known=bool(_row(answer, "user_is_known", source)),
        history_length=int(_row(answer, "history_length", source)),
        model_versions={} if answer.version is None else {model: answer.version},
        exact_fallback=bool(_row(answer, "exact_fallback", source)),
    )


def best_of(retrieval: Retrieval, ranked: Sequence[RankedItem], k: int) -> tuple[Recommendation, ...]:
    """Returns the `k` retrieved items that rank best."""
    candidates = {candidate.item_id: candidate for candidate in retrieval.candidates}
    return tuple(
        Recommendation(
            item_id=item.item_id,
            rank=rank,
            retrieval_score=candidates[item.item_id].retrieval_score,
            reason_item_id=candidates[item.item_id].reason_item_id,
            predictions=item.predictions,
            score=item.score,
            item_is_known=item.item_is_known,
        )
        for rank, item in enumerate(sorted(ranked, key=lambda item: -item.score)[:k], start=1)
    )


def _tasks(answer: Prediction, source: str) -> dict[str, list[float]]:
    return {name: _row(answer, name, source) for name in sorted(answer.outputs.keys() - _NO_TASKS)}


def _columns(answer: Prediction, names: Sequence[str], source: str) -> list[list[Any]]:
    columns = [_row(answer, name, source) for name in names]
    if len({len(column) for column in columns}) != 1:
        raise ServingError(f"{source}: outputs {', '.join(names)} differ in length; check the model")
    return columns


def _row(answer: Prediction, name: str, source: str) -> Any:
    """Returns an output of the only request of the batch."""
    value = answer.outputs.get(name)
    if not isinstance(value, list) or len(value) != 1:
        raise ServingError(f"{source}: the answer lacks output {name!r} for one query; check the model")
    return value[0]
