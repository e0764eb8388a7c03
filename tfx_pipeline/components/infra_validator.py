"""Infra validation: the models that would be pushed answer real questions from a fresh server process."""

# No postponed annotations here: TFX reads the types of the component function.
import dataclasses
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.standard_artifacts import Examples, InfraBlessing, Model

from schema.contract import DatasetSpec, dataset_spec_from_json
from schema.errors import ServingError
from serving.client import Recommendations, RecommenderClient, TwoCalls
from serving.process import ModelServerProcess
from serving.replay import check_golden_requests
from serving.slo import Slo
from tfx_pipeline.components.pusher import BLESSED_AT
from tfx_pipeline.config import BUNDLES
from tfx_pipeline.slo_gate import check_slo
from tfx_pipeline.user_states import UserState, read_user_states, unknown_user_state
from trainer import features
from trainer.fingerprint import Fingerprint, check_together
from trainer.golden import GoldenRequest, read_golden_requests

_LOGGER = logging.getLogger(__name__)
REASON_FILE = "reason.txt"
RECOMMENDATIONS_FILE = "recommendations.json"
# What was measured under the load of the run's objective, if it has one.
LOAD_FILE = "loadtest.json"
_NUM_KNOWN_USERS = 3
_USERS_LOOKED_AT = 1_000
_READABLE_HISTORY = 5
_K = 10
_TIMEOUT_S = 30.0
# gRPC carries float32, REST prints it as decimal text.
_SCORE_TOLERANCE = 1e-5


@component
def ServingValidator(
    retrieval_model: InputArtifact[Model],
    ranking_model: InputArtifact[Model],
    retrieval_exact_model: InputArtifact[Model],
    funnel_model: InputArtifact[Model],
    funnel_exact_model: InputArtifact[Model],
    user_states: InputArtifact[Examples],
    blessing: OutputArtifact[InfraBlessing],
    dataset: Parameter[str],
    slo: Parameter[str],
    failed_before: Parameter[str],
    code_version: Parameter[str],
) -> None:
    """Blesses all bundles together, or none; the reason is beside the blessing in reason.txt.

    How fast a machine answers, and whether a server starts, is not a matter of the models alone: a refusal is
    not for the cache. `failed_before` names the latest one, so that the next run asks again.
    """
    models = (retrieval_model, ranking_model, retrieval_exact_model, funnel_model, funnel_exact_model)
    folders = {name: Path(model.uri) / "Format-Serving" for name, model in zip(BUNDLES, models, strict=True)}
    spec = dataset_spec_from_json(dataset)
    users = read_user_states([f"{user_states.uri}/Split-user_states/*.gz"], spec)
    first_users = list(itertools.islice(users, _USERS_LOOKED_AT))
    os.makedirs(blessing.uri, exist_ok=True)

    def put_load(target: str) -> None:
        if slo:
            objective = Slo.model_validate_json(slo)
            check_slo(objective, target, first_users, Path(blessing.uri) / LOAD_FILE)

    answers: list[dict[str, object]] = []
    try:
        answers = validate_serving(folders, choose_users(first_users), spec, put_load)
        reason = ""
    except ServingError as error:
        reason = str(error)
        _LOGGER.error("infra validation failed, nothing will be pushed: %s", reason)
    (Path(blessing.uri) / REASON_FILE).write_text(reason, encoding="utf-8")
    (Path(blessing.uri) / RECOMMENDATIONS_FILE).write_text(json.dumps(answers, indent=1), encoding="utf-8")
    (Path(blessing.uri) / ("INFRA_NOT_BLESSED" if reason else "INFRA_BLESSED")).touch()
    blessing.set_int_custom_property("blessed", 0 if reason else 1)
    blessing.set_int_custom_property(BLESSED_AT, int(time.time()))
    blessing.set_string_custom_property("reason", reason)


def choose_users(states: Iterable[UserState]) -> list[UserState]:
    """The first users with a history long enough to look at, else the first users."""
    first = list(itertools.islice(states, _USERS_LOOKED_AT))
    experienced = [s for s in first if len(s.query.get(features.HISTORY, ())) >= _READABLE_HISTORY]
    return (experienced or first)[:_NUM_KNOWN_USERS]


def validate_serving(
    folders: dict[str, Path],
    states: list[UserState],
    spec: DatasetSpec,
    then: Callable[[str], None] | None = None,
) -> list[dict[str, object]]:
    """Serves the bundles and asks for recommendations, in one call and in two, and golden requests.

    Over gRPC and REST; the two calls, which any client may make, over gRPC alone.

    Args:
      folders: SavedModel folder by name of the bundle.
      states: users to ask for; a user nobody has seen is added.
      spec: the declaration.
      then: called with the server's gRPC target once all answers are in order; may raise ServingError.

    Returns:
      What each user got over gRPC, for the report: user_id, user_is_known, history, items.

    Raises:
      ServingError: the server does not start, does not answer, answers differently over the two protocols or
        than the trained models did, or its answer is empty, holds an excluded item or a number that is not
        finite.
      BundleError: the bundles are of different runs, or one lacks its fingerprint or golden requests.
    """
    if not states:
        raise ServingError("there are no user states to ask for; the users table is empty")
    check_together({name: Fingerprint.read(folder) for name, folder in folders.items()})
    golden = {name: read_golden_requests(folder) for name, folder in folders.items()}
    stranger = unknown_user_state("funnel-infra-validation-stranger", states[0])
    with tempfile.TemporaryDirectory(prefix="infra-validation-") as root:
        models = {}
        for name, folder in folders.items():
            models[name] = Path(root) / name
            models[name].mkdir()
            (models[name] / "1").symlink_to(folder.resolve(), target_is_directory=True)
        try:
            return _ask(models, golden, [*states, stranger], {task.name for task in spec.tasks}, then)
        except ServingError as error:
            _LOGGER.info("infra validation: %s", error)
            # A server that does not start hands back its log, which ends with the error that stopped it. What
            # it loaded from is gone when this is read: the model's own folder takes its place.
            text = str(error).rpartition("\nerror: ")[2]
            for name, folder in folders.items():
                text = text.replace(str(models[name] / "1"), str(folder)).replace(
                    str(models[name]), str(folder)
                )
            raise ServingError(text) from error


def _ask(
    models: dict[str, Path],
    golden: dict[str, list[GoldenRequest]],
    states: list[UserState],
    tasks: set[str],
    then: Callable[[str], None] | None,
) -> list[dict[str, object]]:
    recommended: list[dict[str, object]] = []
    with (
        ModelServerProcess(models) as server,
        RecommenderClient(server.grpc_target, timeout_s=_TIMEOUT_S) as grpc_client,
        RecommenderClient(server.rest_target, timeout_s=_TIMEOUT_S) as rest_client,
        # The clients above ask the one-call model first, which cannot retrieve what it cannot rank.
        RecommenderClient(server.grpc_target, timeout_s=_TIMEOUT_S, layouts=[TwoCalls()]) as in_two_calls,
    ):
        for name, requests in golden.items():
            check_golden_requests(name, requests, server.grpc_target, server.rest_target)
        for state in states:
            exclude = state.seen_item_ids
            over_grpc, over_rest, of_two = (
                client.recommend(state.request, k=_K, exclude_item_ids=exclude, num_candidates=_K)
                for client in (grpc_client, rest_client, in_two_calls)
            )
            for answer in (over_grpc, over_rest, of_two):
                _check(answer, state, exclude, tasks)
            _check_equal(over_grpc, over_rest, state)
            recommended.append(
                {
                    "user_id": state.user_id,
                    "user_is_known": over_grpc.user_is_known,
                    "history": list(state.query.get(features.HISTORY, ())),
                    "items": [dataclasses.asdict(item) for item in over_grpc.items],
                }
            )
        if then is not None:
            then(server.grpc_target)
    return recommended


def _check(answer: Recommendations, state: UserState, exclude: tuple[str, ...], tasks: set[str]) -> None:
    if not answer.items:
        raise ServingError(f"user {state.user_id!r} got no recommendation")
    for item in answer.items:
        if item.item_id in exclude:
            raise ServingError(f"user {state.user_id!r} got {item.item_id!r}, which the request excluded")
        if not item.item_is_known:
            raise ServingError(
                f"retrieval recommends {item.item_id!r}, which is not in the ranker's catalogue; "
                "both models must come from one run"
            )
        if set(item.predictions) != tasks:
            raise ServingError(
                f"the ranker answered for tasks {sorted(item.predictions)}, expected {sorted(tasks)}"
            )
        numbers = (item.score, item.retrieval_score, *item.predictions.values())
        if not all(math.isfinite(number) for number in numbers):
            raise ServingError(
                f"item {item.item_id!r} for user {state.user_id!r} has a number that is not finite: {item}"
            )


def _check_equal(first: Recommendations, second: Recommendations, state: UserState) -> None:
    if [item.item_id for item in first.items] != [item.item_id for item in second.items]:
        raise ServingError(f"gRPC and REST recommend different items to user {state.user_id!r}")
    for one, other in zip(first.items, second.items, strict=True):
        if not math.isclose(one.score, other.score, rel_tol=_SCORE_TOLERANCE, abs_tol=_SCORE_TOLERANCE):
            raise ServingError(
                f"gRPC and REST score {one.item_id!r} differently: {one.score} and {other.score}"
            )
