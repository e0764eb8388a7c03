"""What all bundles have in common: golden answers wherever they run, and requests that can be merged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scann  # noqa: F401  registers the ops of the index
import tensorflow as tf

from serving.placement import PRODUCTS, Placement, audit
from serving.process import ModelServerProcess
from serving.replay import check_golden_requests
from tests.trainer import funnel_world, ranking_world
from tests.trainer.ranking_requests import SPEC, example, raw_item, write_catalogue
from tests.warmup import allowed_batch_sizes, expected_sizes, warmed_up_sizes
from tfx_pipeline.warmup import add_warmup_requests
from trainer.bundle import save_bundle
from trainer.fingerprint import Fingerprint
from trainer.golden import check_answer, read_golden_requests
from trainer.raw_inputs import MISSING, parse_candidate_examples
from trainer.sample_requests import (
    Arrays,
    golden_requests,
    sample_items,
    sample_request,
    sample_users,
    take,
)

SCANN = ("retrieval", "funnel")
STOCK = ("retrieval_exact", "ranking", "funnel_exact")
BUNDLES = (*SCANN, *STOCK)


@pytest.fixture(scope="module")
def user_states(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(funnel_world.write_user_states(tmp_path_factory.mktemp("states") / "users.gz"))]


@pytest.fixture(scope="module")
def users(user_states: list[str]) -> Arrays:
    return sample_users(user_states, SPEC)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, users: Arrays, monkeypatch_module: Any) -> Path:
    """All bundles with golden requests, a folder of versions each."""
    folder = tmp_path_factory.mktemp("bundles")
    world = funnel_world.make(folder)
    monkeypatch_module.setattr("trainer.sample_requests._NUM_CANDIDATES", funnel_world.MAX_K)
    catalogue = write_catalogue(folder / "items.gz", map(raw_item, ranking_world.ITEMS))
    items = sample_items([catalogue], SPEC, step=1)
    for name, served in world.bundles().items():
        golden = golden_requests(served.calls(), users, items)
        (folder / name).mkdir()
        save_bundle(served, folder / name / "1", Fingerprint({"transform": "a"}), golden)
    return folder


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def loaded(base: Path) -> dict[str, Any]:
    return {name: tf.saved_model.load(str(base / name / "1")) for name in BUNDLES}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_reloaded_bundle_answers_as_the_trained_model(
    base: Path, loaded: dict[str, Any], bundle: str
) -> None:
    golden = read_golden_requests(base / bundle / "1")
    asked = {"serving_default", *(["serving_weighted", "serving_candidates"] if bundle == "ranking" else [])}
    assert {request.signature for request in golden} >= asked
    assert {len(request.inputs["user_id"]) for request in golden} >= {1, 4}
    for request in golden:
        inputs = {name: tf.constant(array) for name, array in request.inputs.items()}
        outputs = loaded[bundle].signatures[request.signature](**inputs)
        check_answer(request, {name: value.numpy() for name, value in outputs.items()}, bundle)


def test_a_server_answers_as_the_trained_models_over_both_protocols(base: Path) -> None:
    with ModelServerProcess({name: base / name for name in BUNDLES}) as server:
        for name in BUNDLES:
            golden = read_golden_requests(base / name / "1")
            check_golden_requests(name, golden, server.grpc_target, server.rest_target)


def test_every_bundle_is_warmed_up_in_all_batch_sizes_that_a_server_may_make(
    base: Path, user_states: list[str]
) -> None:
    assert len(allowed_batch_sizes()) > 3
    for name in BUNDLES:
        add_warmup_requests(base / name / "1", name, user_states, SPEC)
        assert warmed_up_sizes(base / name / "1") == expected_sizes(name)


def led_by_missing(request: Arrays) -> Arrays:
    """The request as a client writes it for servers that pad: every list begins with a missing value."""
    changed = {}
    for name, array in request.items():
        if array.ndim >= 2 and name != "score_weights":
            kind = "string" if array.dtype == object else array.dtype.name
            first = np.full((len(array), 1, *array.shape[2:]), MISSING[kind], array.dtype)
            changed[name] = np.concatenate([first, array], axis=1)
        else:
            changed[name] = array
    return changed


def merged(requests: list[Arrays]) -> dict[str, tf.Tensor]:
    """One batch of several requests, as TensorFlow Serving pads: with the first element of each tensor."""
    result = {}
    for name in requests[0]:
        arrays = [request[name] for request in requests]
        sizes = [max(of_requests) for of_requests in zip(*(a.shape[1:] for a in arrays), strict=True)]
        padded = [np.full((len(a), *sizes), a.flat[0], a.dtype) for a in arrays]
        for target, array in zip(padded, arrays, strict=True):
            target[tuple(map(slice, array.shape))] = array
        result[name] = tf.constant(np.concatenate(padded))
    return result


# Neither in the catalogue nor shown to anybody.
NEW = {name: value for name, value in raw_item("i6").items() if name != "item_counts"} | {
    "item_id": "nowhere"
}


def candidates(*items: dict[str, Any]) -> Arrays:
    parsed = parse_candidate_examples(tf.constant([example(item) for item in items]), SPEC)
    return {name: values.numpy() for name, values in parsed.items()}


def requests_to(name: str, signature: Any, users: Arrays) -> list[Arrays]:
    """Two requests of different users, sizes and lengths of lists."""
    inputs = signature.structured_input_signature[1]
    if set(inputs) == {"examples"}:
        states = list(funnel_world.USERS.values())
        rows = [example({**state, **raw_item("i4"), "seen_item_ids": ["i0"]}) for state in states]
        return [{"examples": np.array(part, object)} for part in (rows[:1], rows[1:])]
    if set(inputs) == {"item_ids"}:
        return [{"item_ids": np.array(rows, object)} for rows in (["i1"], ["nowhere", "i3"])]
    if set(inputs) == {"columns"}:
        return [{"columns": np.array(rows, np.int32)} for rows in ([1], [0, 9])]
    if set(inputs) == {"parts"}:
        return [{"parts": np.array(rows, object)} for rows in (["id"], ["transform", "nothing"])]
    # Of one tag at most, and of two.
    alone = sample_request(inputs, take(users, [1]), candidates(raw_item("i3"), NEW))
    others = sample_request(inputs, take(users, [0, 2]), candidates(*map(raw_item, ranking_world.ITEMS), NEW))
    for request, k in ((alone, 3), (others, 5)):
        if "k" in request:
            request["k"] = np.full_like(request["k"], k)
        if "num_candidates" in request:
            request["num_candidates"] = np.full_like(request["num_candidates"], 2 * k)
    others["exclude_item_ids"] = np.array([["i4", "i5"], ["i6", ""]], object)
    return [
        led_by_missing({key: value for key, value in r.items() if key in inputs}) for r in (alone, others)
    ]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_requests_merged_by_a_server_get_what_they_get_alone(
    loaded: dict[str, Any], users: Arrays, bundle: str
) -> None:
    for name, signature in loaded[bundle].signatures.items():
        requests = requests_to(name, signature, users)
        together = signature(**merged(requests))
        start = 0
        for request in requests:
            alone = signature(**{key: tf.constant(array) for key, array in request.items()})
            rows = len(next(iter(request.values())))
            for key, value in alone.items():
                got = together[key].numpy()[start : start + rows]
                expected = value.numpy()
                if expected.ndim == 2:
                    # The answer is as wide as that of the longest list; what is added is padding.
                    assert not np.any(got[:, expected.shape[1] :] != (b"" if got.dtype == object else 0))
                    got = got[:, : expected.shape[1]]
                if np.issubdtype(expected.dtype, np.floating):
                    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=f"{name} {key}")
                else:
                    np.testing.assert_array_equal(got, expected, err_msg=f"{name} {key}")
            start += rows


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_batch_is_the_first_dimension_of_every_input_and_output(
    loaded: dict[str, Any], bundle: str
) -> None:
    for signature in loaded[bundle].signatures.values():
        inputs = signature.structured_input_signature[1]
        assert inputs
        for spec in (*inputs.values(), *signature.structured_outputs.values()):
            assert spec.shape.rank >= 1 and spec.shape[0] is None


@pytest.fixture(scope="module")
def placements(base: Path) -> dict[str, Placement]:
    """Of the default signatures."""
    return {name: audit(base / name / "1")[0] for name in BUNDLES}


@pytest.mark.parametrize("bundle", STOCK)
def test_all_arithmetic_of_a_stock_bundle_can_run_on_a_gpu(
    placements: dict[str, Placement], bundle: str
) -> None:
    assert placements[bundle].gpu_share(PRODUCTS) == 1.0
    assert placements[bundle].gpu_share() == 1.0


def test_what_only_the_cpu_can_do_is_listed(placements: dict[str, Placement]) -> None:
    of_cpu = {name: {op.op for op in p.ops if not op.has_gpu_kernel} for name, p in placements.items()}
    for name in BUNDLES:
        assert "LookupTableFindV2" in of_cpu[name]
        assert any(op.startswith("Scann>") for op in of_cpu[name]) == (name in SCANN)
        assert not {"MatMul", "BiasAdd", "Relu", "Mul"} & of_cpu[name]
