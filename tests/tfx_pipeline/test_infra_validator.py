"""What would be pushed is asked real questions first; whatever is wrong with the answers is told in words."""

import dataclasses
import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from schema.contract import DatasetSpec, load_dataset_spec
from schema.errors import BundleError, ServingError
from serving import replay
from serving.client import Recommendation, Recommendations
from serving.slo import Slo
from tests.serving import models
from tfx_pipeline import slo_gate
from tfx_pipeline.components import infra_validator
from tfx_pipeline.components.infra_validator import _check, _check_equal, choose_users, validate_serving
from tfx_pipeline.user_states import UserState
from trainer import raw_inputs
from trainer.fingerprint import FINGERPRINT_FILE, Fingerprint
from trainer.golden import GOLDEN_FILE, answered, read_golden_requests, write_golden_requests

TASKS = {"click", "watch_time"}
ITEM = Recommendation("item1", 1, 0.5, "item0", {"click": 0.1, "watch_time": 3.0}, 0.2, True)


def state(user_id: str = "known-u1", history: tuple[str, ...] = ("item0",)) -> UserState:
    query = {"user_id": user_id, "event_time_unix_s": 1_700_000_000, "history_item_ids": list(history)}
    return UserState(user_id, query, history, b"")


def answer(*items: Recommendation, **changes: Any) -> Recommendations:
    first = dataclasses.replace(ITEM, **changes)
    return Recommendations((first, *items), user_is_known=True, history_length=1, model_versions={})


def test_a_sound_answer_passes() -> None:
    _check(answer(), state(), ("item0",), TASKS)


def test_an_empty_answer_is_refused() -> None:
    nothing = Recommendations((), user_is_known=True, history_length=1, model_versions={})
    with pytest.raises(ServingError, match="user 'known-u1' got no recommendation"):
        _check(nothing, state(), (), TASKS)


def test_an_excluded_item_is_refused_wherever_it_stands() -> None:
    second = dataclasses.replace(ITEM, item_id="item0", rank=2)
    with pytest.raises(ServingError, match="got 'item0', which the request excluded"):
        _check(answer(second), state(), ("item0",), TASKS)


@pytest.mark.parametrize(
    "changes",
    [
        {"score": math.nan},
        {"retrieval_score": math.inf},
        {"predictions": {"click": math.nan, "watch_time": 1.0}},
        {"predictions": {"click": 0.1, "watch_time": -math.inf}},
    ],
)
def test_a_number_that_is_not_finite_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match="'item1' for user 'known-u1' has a number that is not finite"):
        _check(answer(**changes), state(), (), TASKS)


def test_an_item_that_the_ranker_does_not_know_is_refused() -> None:
    with pytest.raises(ServingError, match="recommends 'item1', which is not in the ranker's catalogue"):
        _check(answer(item_is_known=False), state(), (), TASKS)


@pytest.mark.parametrize("predictions", [{"click": 0.1}, {"click": 0.1, "watch_time": 1.0, "like": 0.0}])
def test_other_tasks_than_declared_are_refused(predictions: dict[str, float]) -> None:
    with pytest.raises(ServingError, match=r"answered for tasks .*, expected \['click', 'watch_time'\]"):
        _check(answer(predictions=predictions), state(), (), TASKS)


def test_protocols_that_disagree_are_refused() -> None:
    _check_equal(answer(), answer(score=0.2 + 1e-7), state())
    with pytest.raises(ServingError, match="score 'item1' differently"):
        _check_equal(answer(), answer(score=0.21), state())
    with pytest.raises(ServingError, match="different items"):
        _check_equal(answer(), answer(item_id="item2"), state())
    with pytest.raises(ServingError, match="different items"):
        _check_equal(answer(), answer(ITEM), state())


def test_users_with_a_history_to_look_at_are_preferred() -> None:
    long = tuple(f"item{n}" for n in range(5))
    states = [state("a", ()), state("b", long), state("c", long[:4]), state("d", long)]
    assert [s.user_id for s in choose_users(states)] == ["b", "d"]
    assert [s.user_id for s in choose_users(states[:1])] == ["a"]


@pytest.fixture(scope="module")
def spec() -> DatasetSpec:
    full = load_dataset_spec("simulated")
    return full.model_copy(update={"tasks": tuple(task for task in full.tasks if task.name in TASKS)})


def sample(spec: tf.TensorSpec) -> np.ndarray:
    """A request of one user: two items wanted, and everything else missing."""
    shape = [size or 1 for size in spec.shape]
    if spec.name in ("k", "num_candidates"):
        return np.full(shape, 2, np.int32)
    return np.full(shape, raw_inputs.MISSING[spec.dtype.name], spec.dtype.as_numpy_dtype)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Tiny SavedModels with the exported signatures."""
    retrieval, ranking = tmp_path / "a" / "Format-Serving", tmp_path / "b" / "Format-Serving"
    for folder in (retrieval, ranking):
        folder.parent.mkdir()
    models.save(models.Retrieval(), retrieval)
    models.save(models.Ranking(), ranking)
    for folder, served in ((retrieval, models.Retrieval()), (ranking, models.Ranking())):
        complete(folder, served)
    return {"retrieval": retrieval, "ranking": ranking}


def complete(folder: Path, served: Any) -> None:
    """Adds fingerprint and golden requests to a saved model."""
    Fingerprint({"transform": "a"}).write(folder)
    specs = {spec.name: spec for spec in served.serve.input_signature}
    inputs = {name: sample(spec) for name, spec in specs.items()}
    write_golden_requests(folder, [answered("serving_default", inputs, lambda raw: served.serve(**raw))])


class Forgetful(models.Ranking):
    """A ranker of another catalogue."""

    @tf.function(input_signature=models.Ranking.serve.input_signature)
    def serve(self, user_id, age, event_time_unix_s, history_item_ids, candidate_item_ids):
        query = (user_id, age, event_time_unix_s, history_item_ids, candidate_item_ids)
        answer = models.Ranking.serve.python_function(self, *query)
        return {**answer, "item_is_known": tf.zeros_like(answer["item_is_known"])}


def test_a_corrupt_model_is_not_blessed_and_the_reason_is_short(
    folders: dict[str, Path], spec: DatasetSpec
) -> None:
    graph = folders["ranking"] / "saved_model.pb"
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    with pytest.raises(ServingError) as caught:
        validate_serving(folders, [state()], spec)
    reason = str(caught.value)
    assert reason.startswith("model 'ranking': no version")
    # The file to look at, not the temporary link that the server saw.
    assert f"{graph} is not a SavedModel; it is damaged or cut short" in reason
    assert "\n" not in reason and "infra-validation-" not in reason


def test_sound_models_answer_for_every_user_and_a_stranger(
    folders: dict[str, Path], spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infra_validator, "_K", models.MAX_K)
    answers = validate_serving(folders, [state(), state("known-u2", ())], spec)
    assert [given["user_is_known"] for given in answers] == [True, True, False]
    assert [given["history"] for given in answers] == [["item0"], [], []]


def test_a_ranker_of_another_catalogue_is_not_blessed_though_the_one_call_model_answers(
    folders: dict[str, Path], spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(infra_validator, "_K", models.MAX_K)
    for name, served in (("funnel", models.Funnel()), ("ranking", Forgetful())):
        folder = tmp_path / f"new-{name}" / "Format-Serving"
        folder.parent.mkdir()
        models.save(served, folder)
        complete(folder, served)
        folders[name] = folder
    with pytest.raises(ServingError, match="which is not in the ranker's catalogue"):
        validate_serving(folders, [state()], spec)


def test_sound_models_that_miss_the_objective_are_not_blessed(
    folders: dict[str, Path], spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(infra_validator, "_K", models.MAX_K)
    monkeypatch.setattr(slo_gate, "_K", 2)
    monkeypatch.setattr(slo_gate, "_NUM_CANDIDATES", models.MAX_K)
    # However busy the machine is: a request that is not answered in time has no latency, but is an error.
    monkeypatch.setattr(slo_gate, "_TIMEOUT_S", 60.0)
    # An answer in a microsecond: no server holds that.
    slo = Slo(rate_per_s=400, duration_s=0.5, p99_ms=0.001, error_budget=0.5)
    measured = tmp_path / "load.json"
    with pytest.raises(ServingError, match=r"^the objective \(slo\) is missed: p99 .* limit is 0.001 ms$"):
        validate_serving(
            folders, [state()], spec, lambda target: slo_gate.check_slo(slo, target, [state()], measured)
        )
    assert json.loads(measured.read_text())["result"]["num_requests"] > 100


def test_bundles_of_different_runs_are_not_blessed_and_both_are_named(
    folders: dict[str, Path], spec: DatasetSpec
) -> None:
    Fingerprint({"transform": "b"}).write(folders["ranking"])
    with pytest.raises(BundleError, match=r"'retrieval' and 'ranking' do not belong .*transform differs"):
        validate_serving(folders, [state()], spec)


@pytest.mark.parametrize(
    ("file", "message"), [(FINGERPRINT_FILE, "no fingerprint"), (GOLDEN_FILE, "no golden requests")]
)
def test_a_bundle_without_what_it_is_checked_by_is_not_blessed(
    folders: dict[str, Path], spec: DatasetSpec, file: Path, message: str
) -> None:
    (folders["retrieval"] / file).unlink()
    with pytest.raises(BundleError, match=message):
        validate_serving(folders, [state()], spec)


def test_a_model_that_answers_otherwise_than_when_it_was_trained_is_not_blessed(
    folders: dict[str, Path], spec: DatasetSpec
) -> None:
    (golden,) = read_golden_requests(folders["retrieval"])
    changed = {**golden.outputs, "scores": golden.outputs["scores"] + np.float32(0.01)}
    write_golden_requests(folders["retrieval"], [dataclasses.replace(golden, outputs=changed)])
    with pytest.raises(ServingError, match=r"over gRPC: .* other 'scores' than the trained"):
        validate_serving(folders, [state()], spec)


def test_a_server_that_stops_answering_over_rest_is_not_blessed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = read_golden_requests(folders["retrieval"])
    monkeypatch.setattr(replay, "_ask_grpc", lambda stub, model, request: request.outputs)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ServingError, match="'retrieval' over REST does not answer a golden request"):
        replay.check_golden_requests(
            "retrieval", golden, f"grpc://127.0.0.1:{port}", f"http://127.0.0.1:{port}"
        )


def test_a_folder_without_a_model_is_not_blessed(folders: dict[str, Path], spec: DatasetSpec) -> None:
    (folders["retrieval"] / "saved_model.pb").unlink()
    with pytest.raises(ServingError, match="retrieval"):
        validate_serving(folders, [state()], spec)
