"""Client of the pushed models: retrieve, then rank, over gRPC or REST, against this server or the official.

with RecommenderClient("http://127.0.0.1:8501") as client:
    for item in client.recommend({"user_id": "17"}, k=10).items:
        print(item.rank, item.item_id, item.score)
"""

from __future__ import annotations

import difflib
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from schema.errors import ServingError
from serving.transport import (
    BadRequestError,
    DeadlineExceededError,
    InputSpec,
    Kind,
    ModelNotFoundError,
    Prediction,
    ServerUnavailableError,
    Transport,
    deadline_exceeded,
    open_transport,
)

__all__ = [
    "BadRequestError",
    "Candidate",
    "DeadlineExceededError",
    "ModelNotFoundError",
    "RankedItem",
    "Recommendation",
    "Recommendations",
    "RecommenderClient",
    "Retrieval",
    "ServerUnavailableError",
]

_LOGGER = logging.getLogger(__name__)
_RETRIEVAL_ONLY_INPUTS: Final = frozenset({"k", "exclude_item_ids"})
# Inputs of the retrieval model that hold an allow-list: this, and the name of the attribute.
_ALLOW: Final = "allow_"
_RANKING_ONLY_INPUTS: Final = frozenset({"candidate_item_ids"})
_MISSING: Final[dict[Kind, object]] = {"string": "", "float": math.nan, "integer": -1}
_TYPES: Final[Mapping[Kind, Any]] = {"string": str, "integer": int, "float": (int, float)}
_RETRY_WAIT_S: Final = 0.1


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
    tell it. `exact_fallback`: see Retrieval.
    """

    items: tuple[Recommendation, ...]
    user_is_known: bool
    history_length: int
    model_versions: Mapping[str, int]
    exact_fallback: bool = False


class RecommenderClient:
    """Asks a retrieval and a ranking model for recommendations. Safe to share between threads.

    A query maps query features to values: text, a number, or a list of them for a multi-valued feature.
    Features left out, or None, count as missing. An unknown feature is an error that names the nearest one.

    Args:
      target: `grpc://host:port` or `http://host:port`. gRPC imports TensorFlow, REST does not.
      timeout_s: seconds for each call of a method, all requests that it makes included.
      retrieval_model: name of the retrieval model on the server.
      ranking_model: name of the ranking model on the server.

    Raises:
      ConfigError: the target has another form.

    All methods raise:
      ServerUnavailableError: nothing answers, or the server refuses work for now.
      DeadlineExceededError: `timeout_s` is over.
      ModelNotFoundError: the server does not serve the model.
      BadRequestError: unknown feature, wrong type of value, or the model refused the request.
      ServingError: an answer that breaks the signatures' contract.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = 5.0,
        retrieval_model: str = "retrieval",
        ranking_model: str = "ranking",
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._retrieval_model = retrieval_model
        self._ranking_model = ranking_model
        self._transport: Transport = open_transport(target)
        self._specs: dict[str, Mapping[str, InputSpec]] = {}

    def __enter__(self) -> RecommenderClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    def recommend(
        self,
        query: Mapping[str, Any],
        k: int = 20,
        *,
        exclude_item_ids: Iterable[str] = (),
        allow: Mapping[str, Iterable[str]] | None = None,
        num_candidates: int = 100,
    ) -> Recommendations:
        """Retrieves candidates and returns the `k` that rank best.

        Args:
          query: feature values of one user and moment.
          k: items to return, at least 1; fewer come back when the catalogue has no more.
          exclude_item_ids: items never to return.
          allow: item attribute to values; only items with one of the values are returned, an empty list
            allows all. The attributes are those of `index.allow_list` when the model was exported.
          num_candidates: items to retrieve and rank, at least `k`, at most what the model was exported with.
        """
        if not 1 <= k <= num_candidates:
            raise BadRequestError(
                f"expected 1 <= k <= num_candidates, got k={k}, num_candidates={num_candidates}"
            )
        deadline = self._deadline()
        known = self._query_names(self._retrieval_model, deadline) | self._query_names(
            self._ranking_model, deadline
        )
        _check_names(query, known)
        retrieval = self._retrieve(query, num_candidates, exclude_item_ids, allow or {}, deadline)
        versions = {self._retrieval_model: retrieval.model_version}
        candidates = {candidate.item_id: candidate for candidate in retrieval.candidates}
        ranked: list[RankedItem] = []
        if candidates:
            ranked, versions[self._ranking_model] = self._rank(query, list(candidates), deadline)
        items = tuple(
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
        return Recommendations(
            items=items,
            user_is_known=retrieval.user_is_known,
            history_length=retrieval.history_length,
            model_versions={name: version for name, version in versions.items() if version is not None},
            exact_fallback=retrieval.exact_fallback,
        )

    def retrieve(
        self,
        query: Mapping[str, Any],
        k: int,
        *,
        exclude_item_ids: Iterable[str] = (),
        allow: Mapping[str, Iterable[str]] | None = None,
    ) -> Retrieval:
        """Returns the `k` nearest items of the catalogue, best first; arguments as in `recommend`."""
        deadline = self._deadline()
        _check_names(query, self._query_names(self._retrieval_model, deadline))
        return self._retrieve(query, k, exclude_item_ids, allow or {}, deadline)

    def rank(self, query: Mapping[str, Any], item_ids: Sequence[str]) -> list[RankedItem]:
        """Scores items for one query, in the order given."""
        deadline = self._deadline()
        _check_names(query, self._query_names(self._ranking_model, deadline))
        return self._rank(query, item_ids, deadline)[0] if item_ids else []

    def wait_until_ready(self, timeout_s: float) -> None:
        """Waits until both models have an available version.

        Raises:
          ServerUnavailableError: they have not after `timeout_s` seconds; the text tells the last problem.
        """
        deadline = time.monotonic() + timeout_s
        for model in (self._retrieval_model, self._ranking_model):
            while True:
                try:
                    if self._transport.available_versions(model, self._remaining(deadline)):
                        break
                    problem = ServerUnavailableError(
                        f"model {model!r} at {self._target} has no available version"
                    )
                except (ServerUnavailableError, ModelNotFoundError) as error:
                    problem = ServerUnavailableError(str(error))
                except DeadlineExceededError as error:
                    raise ServerUnavailableError(f"not ready after {timeout_s} s: {error}") from error
                if time.monotonic() + _RETRY_WAIT_S >= deadline:
                    raise ServerUnavailableError(f"not ready after {timeout_s} s: {problem}") from problem
                time.sleep(_RETRY_WAIT_S)

    def _retrieve(
        self,
        query: Mapping[str, Any],
        k: int,
        exclude_item_ids: Iterable[str],
        allow: Mapping[str, Iterable[str]],
        deadline: float,
    ) -> Retrieval:
        lists = {"exclude_item_ids": exclude_item_ids}
        lists |= {_ALLOW + attribute: values for attribute, values in allow.items()}
        for name, values in lists.items():
            if isinstance(values, str):
                raise BadRequestError(f"{name} must be a list, got the text {values!r}")
        inputs = self._input_specs(self._retrieval_model, deadline)
        attributes = sorted(name.removeprefix(_ALLOW) for name in inputs if name.startswith(_ALLOW))
        for attribute in allow:
            if attribute not in attributes:
                raise BadRequestError(
                    f"the model cannot filter by {attribute!r}, only by: "
                    f"{', '.join(attributes) or 'nothing'}; "
                    "see index.allow_list in its configuration"
                )
        extra = {"k": k, **{name: list(values) for name, values in lists.items()}}
        answer = self._predict(self._retrieval_model, query, extra, deadline)
        item_ids = self._row(answer, "item_ids")
        scores, reasons = self._row(answer, "scores"), self._row(answer, "reason_item_ids")
        exact_fallback = bool(self._row(answer, "exact_fallback"))
        if exact_fallback:
            _LOGGER.info("exact_fallback=1 k=%d: approximate search found too few allowed items", k)
        if not len(item_ids) == len(scores) == len(reasons):
            raise ServingError(f"{self._target}: outputs of {self._retrieval_model!r} differ in length")
        return Retrieval(
            candidates=tuple(
                Candidate(item_id, score, reason)
                for item_id, score, reason in zip(item_ids, scores, reasons, strict=True)
                if item_id  # "" pads a short list
            ),
            user_is_known=bool(self._row(answer, "user_is_known")),
            history_length=int(self._row(answer, "history_length")),
            model_version=answer.version,
            exact_fallback=exact_fallback,
        )

    def _rank(
        self, query: Mapping[str, Any], item_ids: Sequence[str], deadline: float
    ) -> tuple[list[RankedItem], int | None]:
        answer = self._predict(self._ranking_model, query, {"candidate_item_ids": list(item_ids)}, deadline)
        columns = {name: self._row(answer, name) for name in answer.outputs}
        scores, known = self._row(answer, "score"), self._row(answer, "item_is_known")
        if any(len(column) != len(item_ids) for column in columns.values()) or any(map(math.isnan, scores)):
            raise ServingError(
                f"{self._target}: {self._ranking_model!r} must give one number per candidate; check the model"
            )
        tasks = sorted(columns.keys() - {"score", "item_is_known"})
        ranked = [
            RankedItem(item_id, scores[i], {task: columns[task][i] for task in tasks}, bool(known[i]))
            for i, item_id in enumerate(item_ids)
        ]
        return ranked, answer.version

    def _predict(
        self, model: str, query: Mapping[str, Any], extra: Mapping[str, Any], deadline: float
    ) -> Prediction:
        specs = self._input_specs(model, deadline)
        try:
            inputs = _batch_of_one(specs, query, extra)
            return self._transport.predict(model, inputs, specs, self._remaining(deadline))
        except BadRequestError:
            # A version pushed since the last call may take other features: look once more before giving up.
            self._specs.pop(model, None)  # another thread may have been faster
            newer = self._input_specs(model, deadline)
            if newer == specs:
                raise
            inputs = _batch_of_one(newer, query, extra)
            return self._transport.predict(model, inputs, newer, self._remaining(deadline))

    def _row(self, answer: Prediction, name: str) -> Any:
        """Returns an output of the only request of the batch."""
        value = answer.outputs.get(name)
        if not isinstance(value, list) or len(value) != 1:
            raise ServingError(
                f"{self._target}: the answer lacks output {name!r} for one query; check the model served"
            )
        return value[0]

    def _input_specs(self, model: str, deadline: float) -> Mapping[str, InputSpec]:
        if model not in self._specs:
            self._specs[model] = self._transport.input_specs(model, self._remaining(deadline))
        return self._specs[model]

    def _query_names(self, model: str, deadline: float) -> set[str]:
        specs = self._input_specs(model, deadline)
        if model == self._ranking_model:
            return set(specs) - _RANKING_ONLY_INPUTS
        return {name for name in specs if not name.startswith(_ALLOW)} - _RETRIEVAL_ONLY_INPUTS

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    def _remaining(self, deadline: float) -> float:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise deadline_exceeded(self._target, "the call")
        return remaining


def _check_names(query: Mapping[str, Any], known: set[str]) -> None:
    for name in query:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {nearest[0]!r}?" if nearest else f"the models know: {', '.join(sorted(known))}"
            )
            raise BadRequestError(f"unknown query feature {name!r}; {hint}")


def _batch_of_one(
    specs: Mapping[str, InputSpec], query: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, list[Any]]:
    values = {**query, **extra}
    return {name: [_encode(name, values.get(name), spec)] for name, spec in specs.items()}


def _encode(name: str, value: Any, spec: InputSpec) -> Any:
    """Turns one feature value into the nested list of its input, without the batch dimension."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # NumPy scalars and arrays
    missing = _MISSING[spec.kind]
    if spec.rank == 1:
        return missing if value is None else _checked(name, value, spec)
    if value is not None and not isinstance(value, (list, tuple)):
        raise BadRequestError(f"feature {name!r} is multi-valued: expected a list, got {value!r}")
    return [_checked(name, item, spec) for item in value or ()] or [missing]


def _checked(name: str, value: Any, spec: InputSpec) -> Any:
    if not isinstance(value, _TYPES[spec.kind]) or isinstance(value, bool):
        raise BadRequestError(f"feature {name!r} takes type {spec.kind}, got {value!r}")
    return float(value) if spec.kind == "float" else value
