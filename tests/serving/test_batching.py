"""Dynamic batching with a clock and threads that only move when the test says so."""

import asyncio
import functools
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

import serving
from schema.errors import ConfigError
from serving.batching import Batcher
from serving.batching_config import BatchingParameters, read_batching_parameters
from serving.client import BadRequestError, RecommenderClient
from serving.inference import Call
from serving.metrics import REGISTRY
from serving.model_server import main
from serving.process import ModelServerProcess
from serving.servable import Servable
from serving.status import RequestError, invalid_argument


class Double:
    """Stands for a loaded version: doubles `x`, refuses a batch with a 13, records what it was run on."""

    name, version = "double", 1

    def __init__(self):
        self.runs = []

    def check(self, signature_name, inputs, output_filter):
        if set(inputs) != {"x"}:
            raise invalid_argument("inputs do not match the signature")

    def predict(self, signature_name, inputs):
        self.runs.append(inputs["x"].tolist())
        if (inputs["x"] == 13).any():
            raise invalid_argument("13 is not allowed")
        if signature_name == "echo":
            return {"y": inputs["x"]}
        if signature_name == "total":
            return {"y": np.sum(inputs["x"], keepdims=True).reshape(1)}
        return {"y": inputs["x"] * 2, "x": inputs["x"]}


class Threads(Executor):
    """Keeps what it should run until it is told to."""

    def __init__(self):
        self.waiting = []

    def submit(self, function, *args):
        self.waiting.append((function, args))
        return Future()

    def run_one(self):
        function, args = self.waiting.pop(0)
        function(*args)


class World:
    """A batcher with a model, and everything that could happen by itself in the test's hands."""

    def __init__(self, **parameters):
        self.model, self.threads, self.timers = Double(), Threads(), []
        parameters = {"num_batch_threads": 1, "batch_timeout_s": 0.005, **parameters}
        self.batcher = Batcher(
            BatchingParameters(**parameters),
            self.threads,
            lambda seconds, callback: self.timers.append((seconds, callback)),
        )

    async def ask(self, *rows, signature="", model=None, encode=dict, output_filter=("y",), dtype=np.int64):
        async def submit():
            inputs = {"x": np.array(rows, dtype)}
            return await self.batcher.submit(model or self.model, signature, inputs, encode, output_filter)

        task = asyncio.ensure_future(submit())
        await asyncio.sleep(0)  # lets the request reach its batch
        return task

    def time_is_over(self, batch=0):
        """The time of a batch is over, and no request has come since it was looked at."""
        callback = self.timers.pop(batch)[1]
        num_timers = len(self.timers)
        callback()
        if len(self.timers) > num_timers:
            self.timers.pop()[1]()

    async def run_all(self):
        while self.threads.waiting:
            self.threads.run_one()
            await asyncio.sleep(0)
            await asyncio.sleep(0)


async def answer(task):
    return (await task)["y"].tolist()


class FullAfterOne:
    """Stands for a batcher whose queue takes one request."""

    accepted = None

    def submit(self, *_):
        if self.accepted is not None:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "The queue is full")
        self.accepted = asyncio.get_running_loop().create_future()
        return self.accepted


def in_loop(test):
    @functools.wraps(test)  # pytest reads from it which fixtures the test takes
    def run(**fixtures):
        asyncio.run(asyncio.wait_for(test(**fixtures), timeout=10))

    return run


@in_loop
async def test_requests_within_the_timeout_run_together_and_each_gets_its_own_rows():
    world = World(max_batch_size=8)
    asked = [await world.ask(1, 2), await world.ask(3), await world.ask(4, 5)]
    assert [seconds for seconds, _ in world.timers] == [0.005]
    assert not world.threads.waiting
    world.time_is_over()
    await world.run_all()
    assert [await answer(task) for task in asked] == [[2, 4], [6], [8, 10]]
    assert world.model.runs == [[1, 2, 3, 4, 5]]


@in_loop
async def test_a_full_batch_does_not_wait_for_its_time():
    world = World(max_batch_size=3)
    asked = [await world.ask(1, 2), await world.ask(3)]
    await world.run_all()
    assert [await answer(task) for task in asked] == [[2, 4], [6]]
    world.time_is_over()  # the timer of a batch that is gone does nothing
    assert not world.threads.waiting


@in_loop
async def test_a_request_that_does_not_fit_any_more_opens_the_next_batch():
    world = World(max_batch_size=3, num_batch_threads=2)
    asked = [await world.ask(1, 2), await world.ask(3, 4)]
    world.time_is_over(batch=1)
    await world.run_all()
    assert [await answer(task) for task in asked] == [[2, 4], [6, 8]]
    assert world.model.runs == [[1, 2], [3, 4]]


@in_loop
async def test_of_several_signatures_none_is_run_for_nobody_when_one_is_refused():
    queue = FullAfterOne()
    call = Call(Double(), "MultiInference", ["double", "total"], {"x": np.array([1])}, list)
    with pytest.raises(RequestError, match="full"):
        await call.run_batched(queue)
    assert queue.accepted.cancelled()


@in_loop
async def test_a_batch_that_is_due_takes_in_what_has_arrived_meanwhile():
    world = World(max_batch_size=8, batch_timeout_s=0.0)
    asked = []
    for value in (1, 2, 3):
        asked.append(await world.ask(value))
        [(seconds, look)] = world.timers
        assert seconds == 0
        world.timers.clear()
        look()
        assert not world.threads.waiting
    world.time_is_over()
    await world.run_all()
    assert [await answer(task) for task in asked] == [[2], [4], [6]]
    assert world.model.runs == [[1, 2, 3]]


@in_loop
async def test_a_batch_that_is_due_goes_on_collecting_until_a_thread_is_free():
    world = World(max_batch_size=8, batch_timeout_s=0.0)
    first = await world.ask(1)
    world.time_is_over()
    second = await world.ask(2)
    world.time_is_over()
    third = await world.ask(3)
    assert len(world.threads.waiting) == 1
    await world.run_all()
    assert [await answer(task) for task in (first, second, third)] == [[2], [4], [6]]
    assert world.model.runs == [[1], [2, 3]]


@in_loop
async def test_a_batch_is_filled_up_to_an_allowed_size_with_its_first_row():
    world = World(max_batch_size=8, allowed_batch_sizes=(2, 4, 8))
    asked = [await world.ask(5), await world.ask(6, 7)]
    world.time_is_over()
    await world.run_all()
    assert [await answer(task) for task in asked] == [[10], [12, 14]]
    assert world.model.runs == [[5, 6, 7, 5]]


def counted(name, **labels):
    return REGISTRY.get_sample_value(f":tensorflow:{name}", labels) or 0.0


@in_loop
async def test_a_batch_is_counted_once_and_each_of_its_requests_by_what_it_waited(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr("serving.batching.time.perf_counter", lambda: now_s[0])
    session = "serving:batching_session"
    names = [
        (f"{session}:wrapped_run_count_total", {}),
        (f"{session}:processed_batch_size_count", {}),
        (f"{session}:processed_batch_size_sum", {}),
        (f"{session}:padding_size_count", {"execution_batch_size": "4"}),
        (f"{session}:padding_size_sum", {"execution_batch_size": "4"}),
        (f"{session}:queuing_latency_count", {"thread_pool_name": ""}),
        (f"{session}:queuing_latency_sum", {"thread_pool_name": ""}),
    ]
    before = [counted(name, **labels) for name, labels in names]
    world = World(max_batch_size=8, allowed_batch_sizes=(2, 4, 8))
    first = await world.ask(1, 2)
    now_s[0] += 0.25
    second = await world.ask(3)
    now_s[0] += 0.5
    world.time_is_over()
    await world.run_all()
    assert (await answer(first), await answer(second)) == ([2, 4], [6])
    added = [counted(name, **labels) - old for (name, labels), old in zip(names, before, strict=True)]
    assert added == [1, 1, 4, 1, 1, 2, 1_250_000]  # microseconds


@in_loop
async def test_a_batch_is_one_run_of_the_graph_and_a_latency_of_each_of_its_requests(base_paths):
    servable = Servable("echo", 1, base_paths["echo"] / "1")
    world = World(max_batch_size=8)
    latency = {"model_name": "echo", "API": "Predict", "runtime": "TF1"}

    def counts():
        return counted("core:graph_runs_total"), counted("serving:runtime_latency_count", **latency)

    graph_runs, requests = counts()
    asked = []
    for value in (1.0, 2.0, 3.0):
        inputs = {"x": np.array([value], np.float32)}
        call = Call(servable, "Predict", ["half"], inputs, lambda outputs: outputs[0]["y"].tolist())
        asked.append(asyncio.ensure_future(call.run_batched(world.batcher)))
        await asyncio.sleep(0)
    world.time_is_over()
    await world.run_all()
    assert await asyncio.gather(*asked) == [[0.5], [1.0], [1.5]]
    assert counts() == (graph_runs + 1, requests + 3)


@in_loop
async def test_one_bad_request_fails_alone():
    world = World(max_batch_size=8)
    asked = [await world.ask(value) for value in (1, 2, 13, 4, 5)]
    world.time_is_over()
    await world.run_all()
    with pytest.raises(RequestError, match="13 is not allowed"):
        await asked.pop(2)
    assert [await answer(task) for task in asked] == [[2], [4], [8], [10]]


@in_loop
async def test_a_request_whose_answer_cannot_be_written_fails_alone():
    def refuse(outputs):
        raise invalid_argument("no such text")

    world = World(max_batch_size=8)
    asked = [await world.ask(1), await world.ask(2, encode=refuse), await world.ask(3)]
    world.time_is_over()
    await world.run_all()
    with pytest.raises(RequestError, match="no such text"):
        await asked.pop(1)
    assert [await answer(task) for task in asked] == [[2], [6]]


@in_loop
async def test_a_request_is_refused_when_too_many_batches_wait_and_taken_again_later():
    world = World(max_batch_size=1, max_enqueued_batches=2)
    running, *waiting = [await world.ask(value) for value in (1, 2, 3)]
    with pytest.raises(RequestError, match="queue to which this task was submitted is full") as caught:
        await (await world.ask(4))
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    world.threads.run_one()
    await asyncio.sleep(0)
    accepted = await world.ask(5)
    await world.run_all()
    assert [await answer(task) for task in (running, *waiting, accepted)] == [[2], [4], [6], [10]]


@in_loop
async def test_the_batches_that_wait_are_counted_over_all_shapes_of_a_signature():
    world = World(max_batch_size=1, max_enqueued_batches=2)
    running, *waiting = [await world.ask(1), await world.ask([2]), await world.ask([3, 3])]
    with pytest.raises(RequestError, match="queue to which this task was submitted is full"):
        await (await world.ask([4, 4, 4]))
    another = await world.ask([5, 5, 5], signature="another")
    await world.run_all()
    answers = [await answer(task) for task in (running, *waiting, another)]
    assert answers == [[2], [[4]], [[6, 6]], [[10, 10, 10]]]


@in_loop
async def test_models_signatures_and_shapes_do_not_share_a_batch():
    world = World(max_batch_size=8, num_batch_threads=9)
    other = Double()
    asked = [
        await world.ask(1),
        await world.ask(2, signature="serving_default"),  # the same as no name
        await world.ask(3, signature="another"),
        await world.ask(4, model=other),
        await world.ask([5, 5]),
    ]
    while world.timers:
        world.time_is_over()
    await world.run_all()
    assert [await answer(task) for task in asked] == [[2], [4], [6], [8], [[10, 10]]]
    assert world.model.runs == [[1, 2], [3], [[5, 5]]]
    assert other.runs == [[4]]


@pytest.mark.parametrize(
    ("dtype", "short", "long", "expected"),
    [
        (np.float32, [1, 5], [2, 3, 4, 6], [[1, 5, 1, 1], [2, 3, 4, 6]]),
        (object, [b"a"], [b"b", b"c"], [[b"a", b"a"], [b"b", b"c"]]),
        (object, [], [b"b"], [[b""], [b"b"]]),
    ],
    ids=["float", "string", "empty"],
)
def test_shorter_lists_are_padded_with_their_first_element_when_padding_is_on(dtype, short, long, expected):
    @in_loop
    async def run():
        world = World(max_batch_size=8, pad_variable_length_inputs=True)
        asked = [
            await world.ask(short, signature="echo", dtype=dtype),
            await world.ask(long, signature="echo", dtype=dtype),
        ]
        world.time_is_over()
        await world.run_all()
        assert [await answer(task) for task in asked] == [[row] for row in expected]

    run()


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({}, "at least one input"),
        ({"x": np.array(1)}, "at least one dimension"),
        ({"x": np.zeros(2), "y": np.zeros(3)}, r"equal 0th-dimension size, got x \[2\], y \[3\]"),
        ({"x": np.zeros(9)}, "Task size 9 is larger than maximum input batch size 8"),
    ],
    ids=["none", "scalar", "unequal", "too many"],
)
def test_inputs_that_cannot_be_batched_are_refused(inputs, complaint):
    @in_loop
    async def run():
        world = World(max_batch_size=8)
        world.model.check = lambda *_: None
        with pytest.raises(RequestError, match=complaint) as caught:
            await world.batcher.submit(world.model, "", inputs, dict)
        assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT

    run()


@in_loop
async def test_a_request_that_does_not_fit_the_signature_never_reaches_a_batch():
    world = World()
    with pytest.raises(RequestError, match="do not match"):
        await world.batcher.submit(world.model, "", {"z": np.zeros(1)}, dict)
    assert not world.timers


@in_loop
async def test_an_output_without_a_row_for_each_row_of_input_is_an_error():
    world = World(max_batch_size=8)
    asked = [await world.ask(1, signature="total"), await world.ask(2, signature="total")]
    world.time_is_over()
    await world.run_all()
    for task in asked:
        with pytest.raises(RequestError, match=r"'y' has shape \[1\] for 2 rows") as caught:
            await task
        assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION


@in_loop
async def test_a_request_given_up_while_it_waits_is_not_run():
    world = World(max_batch_size=8)
    given_up, kept = await world.ask(1), await world.ask(2)
    given_up.cancel()
    await asyncio.sleep(0)
    world.time_is_over()
    await world.run_all()
    assert await answer(kept) == [4]
    assert world.model.runs == [[2]]


@in_loop
async def test_no_more_batches_run_at_a_time_than_there_are_threads():
    world = World(max_batch_size=1, num_batch_threads=2)
    asked = [await world.ask(value) for value in range(5)]
    assert len(world.threads.waiting) == 2
    world.threads.run_one()
    await asyncio.sleep(0)
    assert len(world.threads.waiting) == 2
    await world.run_all()
    assert [await answer(task) for task in asked] == [[0], [2], [4], [6], [8]]


# batching.config


def test_a_batching_config_is_read_and_what_it_leaves_out_has_the_official_default(tmp_path):
    path = tmp_path / "batching.config"
    path.write_text(
        "max_batch_size { value: 8 } batch_timeout_micros { value: 1500 } num_batch_threads { value: 3 }\n"
        "thread_pool_name { value: 'x' } allowed_batch_sizes: [2, 8] pad_variable_length_inputs: true"
    )
    assert read_batching_parameters(path) == BatchingParameters(8, 0.0015, 10, 3, (2, 8), True)
    path.write_text("num_batch_threads { value: 1 }")
    assert read_batching_parameters(path) == BatchingParameters(1000, 0.0, 10, 1, (), False)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max_batch_size: 8", "not a BatchingParameters text proto"),
        ("max_batch_siez { value: 8 }", "not a BatchingParameters text proto"),
        ("max_batch_size { value: 0 }", "max_batch_size must be at least 1, got 0"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_s must be at least 0"),
        ("num_batch_threads { value: 0 }", "num_batch_threads must be at least 1"),
        (
            "max_batch_size { value: 8 } allowed_batch_sizes: [2, 4]",
            r"end with max_batch_size 8, got \[2, 4\]",
        ),
        ("max_batch_size { value: 8 } allowed_batch_sizes: [4, 2, 8]", "ascend"),
    ],
)
def test_a_wrong_batching_config_is_refused(tmp_path, text, complaint):
    path = tmp_path / "batching.config"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_batching_parameters(path)
    assert str(path) in str(caught.value)


def test_a_batching_config_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_batching_parameters(tmp_path / "batching.config")


# The server


@pytest.fixture(scope="module")
def batching_server(base_paths, tmp_path_factory):
    config = tmp_path_factory.mktemp("batching") / "batching.config"
    config.write_text(
        "max_batch_size { value: 4 } allowed_batch_sizes: [4] batch_timeout_micros { value: 50000 }\n"
        "num_batch_threads { value: 1 } pad_variable_length_inputs: true"
    )
    flags = ["--enable_batching=true", f"--batching_parameters_file={config}"]
    models = {name: base_paths[name] for name in ("retrieval", "ranking", "examples")}
    with ModelServerProcess(models, flags=flags) as server:
        yield server


def test_requests_over_both_apis_share_batches_and_a_bad_one_fails_alone(batching_server):
    queries = [
        {"user_id": f"u{i}", "history_item_ids": ["item1"] * i, "k": k} for i, k in enumerate((3, 2, 99, 1))
    ]

    def over_grpc(query):
        with RecommenderClient(batching_server.grpc_target) as client:
            return client.retrieve(_features(query), query["k"])

    def over_rest(query):
        with RecommenderClient(batching_server.rest_target) as client:
            return client.retrieve(_features(query), query["k"])

    def ask(number):
        try:
            answer = (over_grpc, over_rest)[number % 2](queries[number])
            return [candidate.item_id for candidate in answer.candidates]
        except BadRequestError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert [answers[i] for i in (0, 1, 3)] == [["item0", "item1", "item2"], ["item0", "item1"], ["item0"]]
    assert "k above the exported maximum" in answers[2]


def _features(query):
    return {name: query[name] for name in ("user_id", "history_item_ids")}


def test_a_request_above_the_maximum_is_refused_as_invalid(batching_server):
    rows = [{"user_id": "u", "age": 1.0, "event_time_unix_s": 1, "history_item_ids": [""], "k": 1,
             "exclude_item_ids": [""], "allow_parity": [""]}] * 5  # fmt: skip
    answer = httpx.post(
        f"{batching_server.rest_target}/v1/models/retrieval:predict", json={"instances": rows}, timeout=30
    )
    assert answer.status_code == 400
    assert answer.json()["error"] == "Task size 5 is larger than maximum input batch size 4"


def _on_examples(request, xs):
    for x in xs:
        request.input.example_list.examples.add().features.feature["x"].float_list.value.append(x)
    return request


def _classification(xs):
    return _on_examples(
        classification_pb2.ClassificationRequest(
            model_spec={"name": "examples", "signature_name": "classify"}
        ),
        xs,
    )


def _regression(xs):
    return _on_examples(
        regression_pb2.RegressionRequest(model_spec={"name": "examples", "signature_name": "regress"}), xs
    )


def _both(xs):
    request = inference_pb2.MultiInferenceRequest()
    for method in ("classify", "regress"):
        task = request.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = "examples", method
    return _on_examples(request, xs)


def test_requests_with_examples_are_batched(batching_server):
    url = f"{batching_server.rest_target}/v1/models/examples:regress"
    with grpc.insecure_channel(batching_server.grpc_target.removeprefix("grpc://")) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def over_rest(xs):
            body = {"signature_name": "regress", "examples": [{"x": x} for x in xs]}
            return httpx.post(url, json=body, timeout=30)

        with ThreadPoolExecutor(4) as pool:  # values that both float types hold exactly
            classified = pool.submit(stub.Classify, _classification([0.25, 0.5]), timeout=30)
            regressed = pool.submit(stub.Regress, _regression([1.0]), timeout=30)
            both = pool.submit(stub.MultiInference, _both([2.0]), timeout=30)
            rest = pool.submit(over_rest, [3.0, 4.0])
        scores = [[c.score for c in row.classes] for row in classified.result().result.classifications]
        assert scores == [[0.75, 0.25], [0.5, 0.5]]
        assert [row.value for row in regressed.result().result.regressions] == [2.0]
        of_task = both.result().results
        classes = of_task[0].classification_result.classifications[0].classes
        assert [(entry.label, entry.score) for entry in classes] == [("low", -1.0), ("high", 2.0)]
        assert of_task[1].regression_result.regressions[0].value == 4.0
        assert rest.result().json() == {"results": [6.0, 8.0]}

        for call, request in (
            (stub.Classify, _classification), (stub.Regress, _regression), (stub.MultiInference, _both),
        ):  # fmt: skip
            with pytest.raises(grpc.RpcError, match="Task size 5 is larger than maximum input batch size 4"):
                call(request([0.5] * 5), timeout=30)
        assert "Task size 5 is larger" in over_rest([0.5] * 5).json()["error"]


def test_a_batching_file_without_batching_is_an_error(base_paths, capsys):
    flags = ["--port=auto", f"--model_base_path={base_paths['echo']}", "--batching_parameters_file=b.config"]
    assert main(flags) == 1
    assert "--batching_parameters_file needs --enable_batching" in capsys.readouterr().err


def test_the_batching_config_of_the_repository_is_valid():
    parameters = read_batching_parameters(Path(serving.__file__).parent / "settings" / "batching.config")
    assert parameters.allowed_batch_sizes[-1] == parameters.max_batch_size == 64
    assert parameters.pad_variable_length_inputs
