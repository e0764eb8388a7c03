"""Client of the pushed models, over gRPC or REST, against this project's server or the official one.

with RecommenderClient("http://127.0.0.1:8501") as client:
    for item in client.recommend({"user_id": "17"}, k=10).items:
        print(item.rank, item.item_id, item.score)
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

from schema.errors import ConfigError, ServingError
from serving.answers import (
    Candidate,
    RankedItem,
    Recommendation,
    Recommendations,
    Retrieval,
    best_of,
    follows_weights,
    parse_funnel,
    parse_pre_ranking,
    parse_ranking,
    parse_retrieval,
    parse_tasks,
)
from serving.queries import (
    CANDIDATES,
    NUM_CANDIDATES,
    SCORE_WEIGHTS,
    K,
    batch_of_one,
    check_names,
    search_inputs,
    weight_columns,
)
from serving.retries import Retrier, RetryPolicy
from serving.transport import (
    DEFAULT_SIGNATURE,
    FINGERPRINT_SIGNATURE,
    PRE_RANK_SIGNATURE,
    TASKS_SIGNATURE,
    WEIGHTED_SIGNATURE,
    BadRequestError,
    DeadlineExceededError,
    InputSpec,
    ModelNotFoundError,
    OverloadedError,
    Prediction,
    ServerUnavailableError,
    Signatures,
    Transport,
    deadline_exceeded,
    open_transport,
)

__all__ = [
    "LAYOUTS",
    "BadRequestError",
    "Candidate",
    "DeadlineExceededError",
    "Layout",
    "ModelNotFoundError",
    "OneCall",
    "OverloadedError",
    "RankedItem",
    "Recommendation",
    "Recommendations",
    "RecommenderClient",
    "Retrieval",
    "RetryPolicy",
    "ServerUnavailableError",
    "TwoCalls",
]

_LOGGER = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
_READY_POLL_S: Final = 0.1
# A newer version may have gained a pre-ranker, or be of another run: no request fails by that.
_KNOWN_FOR_S: Final = 60.0
# Parts of which bundles tell a hash, as in trainer.fingerprint. The trainer is not imported here: it insists
# on being imported before TensorFlow, which a user of the client need not know.
_PARTS: Final = ("transform", "catalogue", "towers", "index", "ranker")
# What the server says of a model.
_AVAILABLE: Final = "is available"
_LOADING: Final = "has no available version"
_UNKNOWN: Final = "is not served"


@dataclass(frozen=True)
class _Request:
    """What a call asks for, and the time.monotonic() by which it wants the answer."""

    query: Mapping[str, Any]
    k: int
    exclude_item_ids: Iterable[str]
    allow: Mapping[str, Iterable[str]]
    score_weights: Mapping[str, float]
    deadline: float


@dataclass
class _Known:
    """What a model was found to be; its newest version may be another since.

    Attributes:
      signatures: see `Transport.signatures`.
      until: time.monotonic() from which it is looked up again.
      tasks: the declared weight of each, in the order of their columns; None until somebody asked.
      num_kept: candidates that its pre-ranker leaves to the ranker; None until it told.
    """

    signatures: Signatures
    until: float
    tasks: Mapping[str, float] | None = None
    num_kept: int | None = None

    @property
    def is_old(self) -> bool:
        """Whether it is to be looked up again."""
        return self.until <= time.monotonic()


@dataclass(frozen=True)
class OneCall:
    """One model retrieves and ranks."""

    funnel: str = "funnel"

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models on the server."""
        return (self.funnel,)


@dataclass(frozen=True)
class TwoCalls:
    """One model retrieves, another ranks; of many candidates its pre-ranker, if it has one, keeps the best.

    A third call keeps them, where retrieval found more than the model says that its ranker should score.

    Attributes:
      retrieval, ranking: names of the models.
    """

    retrieval: str = "retrieval"
    ranking: str = "ranking"

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models on the server."""
        return (self.retrieval, self.ranking)


Layout = OneCall | TwoCalls
_Layout = TypeVar("_Layout", bound=Layout)
# The names under which runs push their bundles; one call before two, ScaNN before exact search.
LAYOUTS: Final[tuple[Layout, ...]] = (
    OneCall("funnel"),
    OneCall("funnel_exact"),
    TwoCalls("retrieval"),
    TwoCalls("retrieval_exact"),
)


class RecommenderClient:
    """Asks the pushed models for recommendations. Safe to share between threads.

    A query maps query features to values: text, a number, or a list of them for a multi-valued feature.
    Features left out, or None, count as missing: a user nobody has seen, or without history, gets what suits
    the rest of the query. An unknown feature is an error that names the nearest one.

    Args:
      target: `grpc://host:port` or `http://host:port`. gRPC imports TensorFlow, REST does not.
      timeout_s: seconds for each call of a method, all requests, retries and waits that it makes included.
      layouts: what the server may serve, best first; the first found there is used from then on, and looked
        for again when it is gone. A single one is taken as given.
      retry: when a request is repeated that the server did not take.
      version_label: asks the version of each model that has this label; without one, the newest.

    Raises:
      ConfigError: the target has another form, or there is no layout.

    All methods raise:
      ServerUnavailableError: nothing answers, the server refuses work for now, or the models are loading.
      DeadlineExceededError: `timeout_s` is over.
      ModelNotFoundError: the server does not serve the model, or none of the layouts.
      BadRequestError: unknown feature, wrong type of value, or the model refused the request.
      ServingError: an answer that breaks the signatures' contract.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = 5.0,
        layouts: Sequence[Layout] = LAYOUTS,
        retry: RetryPolicy | None = None,
        version_label: str | None = None,
    ) -> None:
        if not layouts:
            raise ConfigError("expected at least one layout, such as OneCall() or TwoCalls()")
        self._target = target
        self._timeout_s = timeout_s
        self._layouts = tuple(layouts)
        self._retrier = Retrier(retry or RetryPolicy())
        self._version_label = version_label
        self._transport: Transport = open_transport(target, version_label)
        self._known: dict[str, _Known] = {}
        # With the time.monotonic() from which it is looked up again.
        self._mismatches: dict[tuple[tuple[str, int | None], ...], tuple[str, float]] = {}
        self._found: dict[tuple[Layout, ...], Any] = {}

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
        score_weights: Mapping[str, float] | None = None,
    ) -> Recommendations:
        """Returns the `k` items that rank best among those retrieved.

        Args:
          query: feature values of one user and moment.
          k: items to return, at least 1; fewer come back, down to none, when no more may be recommended.
          exclude_item_ids: items never to return.
          allow: item attribute to values; only items with one of the values are returned, an empty list
            allows all. The attributes are those of `index.allow_list` when the model was exported.
          num_candidates: items to retrieve and rank, at least `k`, at most what the model was exported with.
            Of many a pre-ranker keeps the best, where the models have one.
          score_weights: task to its weight in the score, instead of the declared one, which all other tasks
            keep. A task that counts against an item takes weights up to 0, any other one from 0.

        A retrieval and a ranking model of different runs answer together for the seconds in which a server
        replaces both, or for good when only one of the two passed its gates. Their answer is returned, with
        `mismatch` set and a warning in the log: a ranker can score items it does not know (`item_is_known`).
        """
        if not 1 <= k <= num_candidates:
            raise BadRequestError(
                f"expected 1 <= k <= num_candidates, got k={k}, num_candidates={num_candidates}"
            )
        request = self._request(query, k, exclude_item_ids, allow, score_weights)

        def ask(layout: Layout) -> Recommendations:
            if isinstance(layout, OneCall):
                return self._recommend_in_one(layout, request, num_candidates)
            return self._recommend_in_two(layout, request, num_candidates)

        return self._with_layout(self._layouts, ask, request.deadline)

    def retrieve(
        self,
        query: Mapping[str, Any],
        k: int,
        *,
        exclude_item_ids: Iterable[str] = (),
        allow: Mapping[str, Iterable[str]] | None = None,
    ) -> Retrieval:
        """Returns the `k` nearest items of the catalogue, best first; arguments as in `recommend`."""
        request = self._request(query, k, exclude_item_ids, allow)

        def ask(layout: TwoCalls) -> Retrieval:
            check_names(query, self._input_specs(layout.retrieval, request.deadline))
            return self._retrieve(layout.retrieval, request)

        return self._with_layout(self._layouts_of_two(), ask, request.deadline)

    def pre_rank(self, query: Mapping[str, Any], item_ids: Sequence[str], k: int) -> list[str]:
        """Returns the `k` items, or fewer, that the ranker would probably score highest, the best first.

        An item that is named several times is returned once. The ranking model must have a pre-ranker.
        """
        deadline = self._deadline()

        def ask(layout: TwoCalls) -> list[str]:
            if PRE_RANK_SIGNATURE not in self._known_of(layout.ranking, deadline).signatures:
                raise BadRequestError(
                    f"model {layout.ranking!r} has no pre-ranker; set ranking.preranker before it is trained"
                )
            check_names(query, self._input_specs(layout.ranking, deadline))
            return self._pre_rank(layout.ranking, query, item_ids, k, deadline)[0] if item_ids else []

        return self._with_layout(self._layouts_of_two(), ask, deadline)

    def rank(
        self,
        query: Mapping[str, Any],
        item_ids: Sequence[str],
        *,
        score_weights: Mapping[str, float] | None = None,
    ) -> list[RankedItem]:
        """Scores items for one query, in the order given; arguments as in `recommend`."""
        request = self._request(query, len(item_ids), (), None, score_weights)

        def ask(layout: TwoCalls) -> list[RankedItem]:
            check_names(query, self._input_specs(layout.ranking, request.deadline))
            return self._rank(layout.ranking, request, item_ids)[0] if item_ids else []

        return self._with_layout(self._layouts_of_two(), ask, request.deadline)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Waits until all models of one of the layouts have an available version.

        Raises:
          ServerUnavailableError: they have not after `timeout_s` seconds; the text tells the last problem.
        """
        deadline = time.monotonic() + timeout_s
        problem: ServingError | None = None
        while True:
            is_over = False
            try:
                self._discover(self._layouts, deadline)
                return
            except (ServerUnavailableError, ModelNotFoundError) as error:
                problem = error
            except DeadlineExceededError as error:
                problem = problem or error  # what a look that was cut short would have found
                is_over = True
            if is_over or time.monotonic() + _READY_POLL_S >= deadline:
                raise ServerUnavailableError(f"not ready after {timeout_s} s: {problem}") from problem
            time.sleep(_READY_POLL_S)

    def _request(
        self,
        query: Mapping[str, Any],
        k: int,
        exclude_item_ids: Iterable[str],
        allow: Mapping[str, Iterable[str]] | None,
        score_weights: Mapping[str, float] | None = None,
    ) -> _Request:
        # An iterator must serve two tries, when the first finds that the layout is gone.
        exclude = exclude_item_ids if isinstance(exclude_item_ids, str) else tuple(exclude_item_ids)
        return _Request(query, k, exclude, allow or {}, score_weights or {}, self._deadline())

    def _recommend_in_one(self, layout: OneCall, request: _Request, num_candidates: int) -> Recommendations:
        specs = self._input_specs(layout.funnel, request.deadline)
        check_names(request.query, specs)
        extra = {
            **search_inputs(specs, request.k, request.exclude_item_ids, request.allow),
            NUM_CANDIDATES: num_candidates,
        }
        started = time.perf_counter()

        def ask(weights: Mapping[str, Any]) -> Recommendations:
            answer = self._predict(layout.funnel, request.query, {**extra, **weights}, request.deadline)
            return parse_funnel(answer, layout.funnel, self._source(layout.funnel))

        parsed = self._weighted(layout.funnel, DEFAULT_SIGNATURE, request, ask, lambda answer: answer.items)
        if parsed.exact_fallback:
            _log_fallback(request.k)
        return dataclasses.replace(parsed, stage_seconds={"funnel": time.perf_counter() - started})

    def _recommend_in_two(self, layout: TwoCalls, request: _Request, num_candidates: int) -> Recommendations:
        deadline = request.deadline
        inputs = {name for model in layout.models for name in self._input_specs(model, deadline)}
        check_names(request.query, inputs)
        seconds = {}
        started = time.perf_counter()
        retrieval = self._retrieve(layout.retrieval, dataclasses.replace(request, k=num_candidates))
        seconds["retrieve"] = time.perf_counter() - started
        versions = {layout.retrieval: retrieval.model_version}
        ranked: list[RankedItem] = []
        mismatch = ""
        item_ids = [candidate.item_id for candidate in retrieval.candidates]
        ranker = self._known_of(layout.ranking, deadline)
        num_kept = max(ranker.num_kept or 0, request.k)
        if PRE_RANK_SIGNATURE in ranker.signatures and len(item_ids) > num_kept:
            started = time.perf_counter()
            # How many are kept it tells in its answer: before the first one, all are asked for.
            wanted = len(item_ids) if ranker.num_kept is None else num_kept
            best, ranker.num_kept = self._pre_rank(layout.ranking, request.query, item_ids, wanted, deadline)
            kept = set(best[: max(ranker.num_kept, request.k)])
            # In the order in which retrieval found them, which decides between equal scores.
            item_ids = [item_id for item_id in item_ids if item_id in kept]
            seconds["pre_rank"] = time.perf_counter() - started
        if item_ids:
            started = time.perf_counter()
            ranked, versions[layout.ranking] = self._rank(layout.ranking, request, item_ids)
            seconds["rank"] = time.perf_counter() - started
            mismatch = self._mismatch(versions, deadline)
        return Recommendations(
            items=best_of(retrieval, ranked, request.k),
            user_is_known=retrieval.user_is_known,
            history_length=retrieval.history_length,
            model_versions={name: version for name, version in versions.items() if version is not None},
            exact_fallback=retrieval.exact_fallback,
            mismatch=mismatch,
            stage_seconds=seconds,
        )

    def _retrieve(self, model: str, request: _Request) -> Retrieval:
        specs = self._input_specs(model, request.deadline)
        extra = search_inputs(specs, request.k, request.exclude_item_ids, request.allow)
        answer = self._predict(model, request.query, extra, request.deadline)
        retrieval = parse_retrieval(answer, self._source(model))
        if retrieval.exact_fallback:
            _log_fallback(request.k)
        return retrieval

    def _pre_rank(
        self, model: str, query: Mapping[str, Any], item_ids: Sequence[str], k: int, deadline: float
    ) -> tuple[list[str], int]:
        extra = {CANDIDATES: list(item_ids), K: k}
        answer = self._predict(model, query, extra, deadline, PRE_RANK_SIGNATURE)
        return parse_pre_ranking(answer, self._source(model))

    def _rank(
        self, model: str, request: _Request, item_ids: Sequence[str]
    ) -> tuple[list[RankedItem], int | None]:
        signature = WEIGHTED_SIGNATURE if request.score_weights else DEFAULT_SIGNATURE

        def ask(weights: Mapping[str, Any]) -> tuple[list[RankedItem], int | None]:
            extra = {CANDIDATES: list(item_ids), **weights}
            answer = self._predict(model, request.query, extra, request.deadline, signature)
            return parse_ranking(answer, item_ids, self._source(model)), answer.version

        return self._weighted(model, signature, request, ask, lambda answer: answer[0])

    def _weighted(
        self,
        model: str,
        signature: str,
        request: _Request,
        ask: Callable[[Mapping[str, Any]], _Answer],
        items: Callable[[_Answer], Iterable[RankedItem | Recommendation]],
    ) -> _Answer:
        """Asks with the weights of the request, as further inputs.

        Weights stand in columns. A version pushed since the last call may have others, or in another order:
        it is looked up again where they name no task or are refused, or the scores do not follow from them.
        """
        if not request.score_weights:
            return ask({})
        known = self._known_of(model, request.deadline)
        for is_old in (known.tasks is not None, False):
            if not is_old:
                known.tasks = self._tasks_of(model, known.signatures, signature, request.deadline)
            tasks = known.tasks or {}
            weights = {**tasks, **request.score_weights}
            if not is_old or weights.keys() == tasks.keys():
                try:
                    answer = ask({SCORE_WEIGHTS: weight_columns(tasks, request.score_weights)})
                except BadRequestError:  # a weight in the column of another task, maybe
                    if not is_old:
                        raise
                else:
                    if follows_weights(items(answer), weights):
                        return answer
        raise ServingError(
            f"{self._source(model)} gives scores that are not the sum of its predictions by the weights "
            "asked for; check the model"
        )

    def _predict(
        self,
        model: str,
        query: Mapping[str, Any],
        extra: Mapping[str, Any],
        deadline: float,
        signature: str = DEFAULT_SIGNATURE,
    ) -> Prediction:
        specs = self._input_specs(model, deadline, signature)
        inputs = batch_of_one(specs, query, extra)
        return self._retrier.call(
            lambda: self._transport.predict(model, inputs, specs, self._remaining(deadline), signature),
            deadline,
        )

    def _mismatch(self, versions: Mapping[str, int | None], deadline: float) -> str:
        """Names the parts in which versions of models differ; asked once per combination of versions.

        Models that tell no version are asked again after a while: others may have taken their place.
        """
        key = tuple(versions.items())
        known, until = self._mismatches.get(key, ("", 0.0))
        if time.monotonic() < until:
            return known
        parts = {model: self._fingerprints(model, version, deadline) for model, version in versions.items()}
        differing = [
            part
            for i, part in enumerate(_PARTS)
            if len({hashes[i] for hashes in parts.values() if hashes and hashes[i]}) > 1
        ]
        mismatch = ", ".join(differing)
        if mismatch not in ("", known):
            _LOGGER.warning("models of different runs answer together: %s in %s", versions, differing)
        until = time.monotonic() + _KNOWN_FOR_S if None in versions.values() else math.inf
        self._mismatches[key] = mismatch, until
        return mismatch

    def _fingerprints(self, model: str, version: int | None, deadline: float) -> Sequence[str]:
        """Hashes of _PARTS; none from a model that was exported before there were fingerprints."""
        if FINGERPRINT_SIGNATURE not in self._known_of(model, deadline).signatures:
            return ()
        return self._retrier.call(
            lambda: self._transport.fingerprints(model, version, _PARTS, self._remaining(deadline)), deadline
        )

    def _tasks_of(
        self, model: str, signatures: Signatures, signature: str, deadline: float
    ) -> Mapping[str, float]:
        """The declared weight of each task, in the order of the columns of a signature's `score_weights`."""
        if TASKS_SIGNATURE not in signatures:
            raise BadRequestError(
                f"{self._source(model)} does not tell which tasks it weighs, since an older version of "
                "Funnel exported it; leave score_weights out, or push a model of this version"
            )
        columns = {"columns": list(range(signatures[signature][SCORE_WEIGHTS].width or 0))}
        answer = self._retrier.call(
            lambda: self._transport.predict(
                model, columns, signatures[TASKS_SIGNATURE], self._remaining(deadline), TASKS_SIGNATURE
            ),
            deadline,
        )
        return parse_tasks(answer, self._source(model))

    def _input_specs(
        self, model: str, deadline: float, signature: str = DEFAULT_SIGNATURE
    ) -> Mapping[str, InputSpec]:
        signatures = self._known_of(model, deadline).signatures
        if signature not in signatures:
            raise BadRequestError(f"{self._source(model)} has no signature {signature!r} any more")
        return signatures[signature]

    def _known_of(self, model: str, deadline: float) -> _Known:
        known = self._known.get(model)
        if known is None or known.is_old:
            known = self._known[model] = self._look_up(model, deadline)
        return known

    def _look_up(self, model: str, deadline: float) -> _Known:
        signatures = self._retrier.call(
            lambda: self._transport.signatures(model, self._remaining(deadline)), deadline
        )
        return _Known(signatures, time.monotonic() + _KNOWN_FOR_S)

    def _with_layout(
        self, layouts: tuple[_Layout, ...], ask: Callable[[_Layout], _Answer], deadline: float
    ) -> _Answer:
        """Asks in the layout that the server was found to serve, and looks again when its models are gone."""
        if len(layouts) == 1:
            return self._ask(layouts[0], ask, deadline)
        layout = self._found.get(layouts)
        if layout is None:
            layout = self._found[layouts] = self._retrier.call(
                lambda: self._discover(layouts, deadline), deadline
            )
        try:
            return self._ask(layout, ask, deadline)
        except ModelNotFoundError:
            newer = self._found[layouts] = self._discover(layouts, deadline)
            if newer == layout:
                raise
            return self._ask(newer, ask, deadline)

    def _ask(self, layout: _Layout, ask: Callable[[_Layout], _Answer], deadline: float) -> _Answer:
        """Asks, and once more where a request is refused and its models are not what they were known to be.

        A version pushed since may take other features, or have lost its pre-ranker.
        """
        before = {model: known for model, known in self._known.items() if not known.is_old}
        try:
            return ask(layout)
        except BadRequestError as refused:
            # Another thread may have looked again since: what it found is not what was refused.
            used = {**self._known, **before}
            try:
                newer = {model: self._look_up(model, deadline) for model in layout.models if model in used}
            except ServingError:
                raise refused from None
            changed = {m: known for m, known in newer.items() if known.signatures != used[m].signatures}
            if not changed:
                raise
            self._known |= changed
            return ask(layout)

    def _discover(self, layouts: tuple[_Layout, ...], deadline: float) -> _Layout:
        """Returns the first of the layouts whose models all have an available version."""
        states: dict[str, str] = {}
        for layout in layouts:
            for model in layout.models:
                if model not in states:
                    states[model] = self._state(model, deadline)
            if all(states[model] == _AVAILABLE for model in layout.models):
                return layout
        text = f"{self._target} serves none of {', '.join(' + '.join(layout.models) for layout in layouts)}"
        states_text = ", ".join(f"{model} {state}" for model, state in states.items())
        if _LOADING in states.values():
            raise ServerUnavailableError(f"{text} yet: {states_text}")
        raise ModelNotFoundError(f"{text}: {states_text}; check the model names and what the server serves")

    def _state(self, model: str, deadline: float) -> str:
        try:
            versions = self._transport.available_versions(model, self._remaining(deadline))
        except ModelNotFoundError:
            return _UNKNOWN
        except BadRequestError:  # so servers answer where a model lacks the label
            if not self._version_label:
                raise
            return f"has no version with label {self._version_label!r}"
        return _AVAILABLE if versions else _LOADING

    def _layouts_of_two(self) -> tuple[TwoCalls, ...]:
        layouts = tuple(layout for layout in self._layouts if isinstance(layout, TwoCalls))
        if not layouts:
            raise ConfigError("to retrieve or rank alone, give the client a layout TwoCalls()")
        return layouts

    def _source(self, model: str) -> str:
        return f"{self._target}: model {model!r}"

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    def _remaining(self, deadline: float) -> float:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise deadline_exceeded(self._target, "the call")
        return remaining


def _log_fallback(k: int) -> None:
    _LOGGER.info("exact_fallback=1 k=%d: approximate search found too few allowed items", k)
