"""Malformed and hostile clients: each gets an error, and the server answers everybody else as before."""

import asyncio
import gzip
import http.client
import itertools
import json
import logging
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import grpc
import httpx
import numpy as np
import psutil
import pytest
import tensorflow as tf
import uvloop
from aiohttp import web
from grpc._cython import cygrpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving.config import ModelConfig
from serving.grpc_service import add_services  # its filter of grpc's log is under test, too
from serving.manager import ModelManager
from serving.rest import RestSettings, create_runner
from serving.thread_pool import ThreadPool
from tests.serving.waiting import wait_for

FUZZ = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PREDICT = "/v1/models/echo:predict"
GRPC_PREDICT = "/tensorflow.serving.PredictionService/Predict"
GRPC_STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
ECHO = model_pb2.ModelSpec(name="echo")
METHODS = ("Predict", "Classify", "Regress", "MultiInference", "GetModelMetadata")


@pytest.fixture(scope="module")
def address(server):
    parts = urlsplit(server.rest_target)
    return parts.hostname, parts.port


@pytest.fixture(scope="module")
def channel(server):
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://"), options) as channel:
        yield channel


@pytest.fixture(autouse=True)
def still_serving(server, channel):
    """After every test: the same process answers over both APIs, has no file left open and lost no memory."""
    process = psutil.Process(server.pid)
    num_files, memory_bytes = process.num_fds(), process.memory_info().rss
    yield
    assert ask_rest(server) == [0.5]
    wait_for(lambda: ask_grpc(channel) == 0.5)
    wait_for(lambda: process.num_fds() <= num_files + 5)
    assert process.memory_info().rss < memory_bytes + 200 * 2**20


def ask_rest(server):
    body = {"signature_name": "half", "instances": [1.0]}
    return httpx.post(f"{server.rest_target}{PREDICT}", json=body, timeout=10).json()["predictions"]


def ask_grpc(channel):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    try:
        return stub.Predict(half_request([1.0]), timeout=10).outputs["y"].float_val[0]
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:  # calls given up a moment ago still count
            return None
        raise


def half_request(values):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "echo"
    request.model_spec.signature_name = "half"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.array(values, np.float32)))
    return request


def sleep_request(seconds):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "echo"
    request.model_spec.signature_name = "sleep"
    request.inputs["seconds"].CopyFrom(tf.make_tensor_proto(np.float32(seconds)))
    return request


def post(address, body, path=PREDICT, **headers):
    """Status and error text of a body sent as it is; `Content_Encoding` is the header Content-Encoding."""
    connection = http.client.HTTPConnection(*address, timeout=20)
    try:
        connection.request("POST", path, body, {name.replace("_", "-"): headers[name] for name in headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()).get("error", "")
    finally:
        connection.close()


def talk(address, *chunks, half_close=False, timeout_s=20):
    """Sends bytes as they are; returns what comes back until the server closes, or TimeoutError."""
    answer = b""
    with socket.create_connection(address, timeout=timeout_s) as connection, suppress(ConnectionError):
        for chunk in chunks:
            connection.sendall(chunk)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(2**16):
            answer += data
    return answer


# REST: bodies

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)
inputs_of_echo = st.fixed_dictionaries(
    {}, optional={"text": json_values, "number": json_values, "floats": json_values}
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "signature_name": st.sampled_from(["", "half", "sleep", "nothing", 1, None]),
        "instances": json_values | st.lists(inputs_of_echo, max_size=3),
        "inputs": json_values | inputs_of_echo,
        "examples": json_values | st.lists(st.dictionaries(st.text(max_size=4), json_values), max_size=3),
        "context": json_values,
    },
)


@FUZZ
@given(
    body=bodies,
    path=st.sampled_from([PREDICT, "/v1/models/examples:classify", "/v1/models/examples:regress"]),
)
def test_any_json_is_answered_or_refused(address, body, path):
    status, _ = post(address, json.dumps(body).encode("utf-8", "surrogatepass"), path)
    assert status in (200, 400)


@FUZZ
@given(body=st.binary(max_size=200))
def test_any_bytes_are_refused(address, body):
    assert post(address, body)[0] == 400


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"[" * 2_000_000, "JSON Parse error"),
        (b'{"inputs":' * 200_000, "JSON Parse error"),
        (
            b'{"signature_name": "half", "inputs": ' + b"[" * 40 + b"1.0" + b"]" * 40 + b"}",
            "nested deeper than 32",
        ),
        (b'{"signature_name": "half", "inputs": [' + b"9" * 1_000_000 + b"]}", "JSON Parse error"),
        (b'{"signature_name": "half", "inputs": [1e400]}', "range"),
        (b'{"signature_name": "half", "inputs": [1e39]}', "range"),
        (b'{"inputs": "\xc3\x28"}', "JSON Parse error"),
        (b'{"inputs": "\xed\xa0\x80"}', "JSON Parse error"),
        (b'{"inputs": {"a": 1}}' + b"\x00" * 100, "JSON Parse error"),
        (b'{"signature_name": "' + b"x" * 1_000_000 + b'", "inputs": []}', "Serving signature"),
        (b'{"inputs": {' + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}}", "Missing: floats"),
    ],
    ids=[
        "lists",
        "objects",
        "rank",
        "digits",
        "1e400",
        "1e39",
        "not UTF-8",
        "surrogate",
        "zeros",
        "name",
        "names",
    ],
)
def test_a_body_made_to_hurt_gets_a_short_error(address, body, complaint):
    started = time.monotonic()
    status, error = post(address, body)
    assert status == 400
    assert complaint in error
    assert len(error) < 3000
    assert time.monotonic() - started < 5


# REST: connections


@pytest.mark.parametrize(
    "chunks",
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",),  # HTTP/2
        (b"\x00" * 10_000,),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",),
        (b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n",),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(10_000)) + b"\r\n",),
        (b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",),
        (
            b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\n"
            b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        ),
        (b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",),
    ],
    ids=["tls", "http2", "zeros", "long path", "long header", "many headers", "length", "lengths", "chunk"],
)
def test_what_is_no_http_request_is_refused(address, server, chunks):
    answer = talk(address, *chunks)
    assert answer == b"" or answer.split(b"\r\n")[0].split(b" ")[1] == b"400"
    assert "Traceback" not in server.log


def test_a_body_that_claims_gigabytes_is_refused_before_it_comes(address):
    head = b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000000\r\n\r\n"
    answer = talk(address, head, b"{")
    assert b"413" in answer.split(b"\r\n")[0]


def test_a_packed_body_that_unpacks_to_more_than_the_limit_is_refused(address):
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    body = b"".join(packer.compress(b" " * 2**24) for _ in range(20)) + packer.flush()  # 320 MiB
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head % (PREDICT.encode(), len(body)) + body)
        answer = connection.recv(2**16)
    assert answer.split(b" ")[1] in (b"400", b"413")


def test_a_packed_body_of_empty_members_is_refused_and_costs_little(address):
    body = gzip.compress(b"") * 1_000_000 + gzip.compress(b"{}")  # 20 MB
    started = time.monotonic()
    status, error = post(address, body, Content_Encoding="gzip")
    assert (status, error) == (400, "the body has more than 10,000 gzip members")
    assert time.monotonic() - started < 5


def test_connections_closed_in_the_middle_leave_nothing_behind(address, server):
    body = b'{"signature_name": "sleep", "inputs": 0.2}'
    head = b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    for sent in (b"", b"POST /v1", head, head + body[:10], head + body):
        for reset in (False, True):
            connection = socket.create_connection(address, timeout=5)
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(sent)
            time.sleep(0.1)  # so that the server reads the body when the connection goes
            connection.close()
    assert ask_rest(server) == [0.5]
    assert "Traceback" not in server.log


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_a_half_closed_connection_is_closed_at_once_and_its_call_not_waited_for(address, seconds):
    body = b'{"signature_name": "sleep", "inputs": %.1f}' % seconds
    head = b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    started = time.monotonic()
    answer = talk(address, head + body, half_close=True)
    assert time.monotonic() - started < 4
    # A whole answer, where it was written before the server met the end, or none.
    assert answer == b"" or (seconds == 0.0 and answer.endswith(b'{"outputs":0.0}'))


def test_two_hundred_slow_clients_do_not_hold_up_a_fast_one(address, server):
    head = b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    slow = [socket.create_connection(address, timeout=5) for _ in range(200)]
    try:
        for i, connection in enumerate(slow):
            connection.sendall(head if i % 2 else b"POST /v1/mod")
        started = time.monotonic()
        assert ask_rest(server) == [0.5]
        assert time.monotonic() - started < 4
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize("api", ["rest", "grpc"])
def test_a_server_out_of_open_files_answers_again_once_connections_are_closed(server, channel, api):
    process = psutil.Process(server.pid)
    host, port = urlsplit(server.rest_target if api == "rest" else server.grpc_target).netloc.split(":")
    assert ask_grpc(channel) == 0.5  # so that it has a connection
    limits = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 20, limits[1]))
    connections = []
    try:
        connections += [socket.create_connection((host, int(port)), timeout=5) for _ in range(40)]
        with pytest.raises(httpx.TransportError):
            ask_rest(server)
        assert ask_grpc(channel) == 0.5
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, limits)
        for connection in connections:
            connection.close()
    wait_for(lambda: answers_rest(server))


def answers_rest(server):
    try:
        return ask_rest(server) == [0.5]
    except httpx.TransportError:
        return False


# REST: limits, in this process, where they can be short


@pytest.fixture(scope="module")
def loop():
    """An event loop, as the server's, that runs in a thread of its own."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(end_other_tasks())
    loop.close()


@pytest.fixture(scope="module")
def echo_manager(echo_versions):
    manager = ModelManager()
    manager.load({"echo": ModelConfig("echo", echo_versions)})
    return manager


@pytest.fixture(scope="module")
def limited(loop, echo_manager):
    """Address of a REST API whose timeouts are 0.3 s, with bodies up to 10 kB and 3 requests at once."""
    limits = RestSettings(
        max_concurrent_requests=3, max_body_bytes=10_000, body_timeout_s=0.3, idle_timeout_s=0.3
    )
    listener = socket.create_server(("127.0.0.1", 0))

    async def start():
        runner = create_runner(echo_manager, ThreadPool(4, "rest"), limits, shutdown_timeout_s=1)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield listener.getsockname()
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()


async def end_other_tasks():
    """Ends those of connections whose clients have only just gone."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def closed_after(connection):
    """Seconds until the server closes, and what it sent before."""
    started, answer = time.monotonic(), b""
    while data := connection.recv(2**16):
        answer += data
    return time.monotonic() - started, answer


@pytest.mark.parametrize("trickle", [b"", b"POST /v1/models", b"GET / HTTP/1.1\r\nA: b\r\n"])
def test_a_connection_without_a_whole_head_is_closed(limited, trickle):
    with socket.create_connection(limited, timeout=5) as connection:
        connection.sendall(trickle)
        duration_s, answer = closed_after(connection)
    assert duration_s > 0.2
    assert answer == b""


def test_a_head_that_trickles_in_does_not_win_time(limited):
    with socket.create_connection(limited, timeout=5) as connection:
        started = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(b"A")
                time.sleep(0.05)
        assert time.monotonic() - started < 4


def test_a_body_that_does_not_come_is_408(limited):
    with socket.create_connection(limited, timeout=5) as connection:
        connection.sendall(
            b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        )
        answer = connection.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"not complete after 0.3 s" in answer


def test_a_body_above_the_limit_is_413(limited):
    status, error = post(limited, b" " * 10_001)
    assert status == 413
    assert "10000" in error


def test_the_members_of_a_packed_body_share_the_limit(limited):
    half, empty = gzip.compress(b" " * 5000), gzip.compress(b"")
    for members, status, complaint in (
        ([half, half], 400, "JSON Parse error"),  # read as a whole
        ([half, half, empty], 400, "JSON Parse error"),
        ([half, half, gzip.compress(b" ")], 413, "10000"),
        ([half, half, half], 413, "10000"),
    ):
        got, error = post(limited, b"".join(members), Content_Encoding="gzip")
        assert got == status
        assert complaint in error


def test_requests_beyond_the_limit_are_429_before_their_body_is_read(limited):
    connections = [socket.create_connection(limited, timeout=5) for _ in range(4)]
    try:
        for connection in connections:
            connection.sendall(
                b"POST /v1/models/echo:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            )
        statuses = [connection.recv(2**16).split(b" ")[1] for connection in connections]
        assert sorted(statuses) == [b"408", b"408", b"408", b"429"]
    finally:
        for connection in connections:
            connection.close()
    assert post(limited, b'{"signature_name": "half", "instances": [1.0]}')[0] == 200


# gRPC


@FUZZ
@given(message=st.binary(max_size=100), method=st.sampled_from(METHODS))
def test_any_bytes_as_a_grpc_message_are_refused(channel, message, method):
    call = channel.unary_unary(
        f"/tensorflow.serving.PredictionService/{method}",
        request_serializer=bytes,
        response_deserializer=bytes,
    )
    with pytest.raises(grpc.RpcError) as caught:
        call(message, timeout=10)
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize(
    "method", [*(f"PredictionService/{method}" for method in METHODS), "ModelService/GetModelStatus"]
)
def test_bytes_that_are_no_message_are_an_invalid_argument_and_no_stack_trace(channel, server, method):
    call = channel.unary_unary(
        f"/tensorflow.serving.{method}", request_serializer=bytes, response_deserializer=bytes
    )
    with pytest.raises(grpc.RpcError, match=r"the message is not one that \w+ takes") as caught:
        call(b"\xff\xff\xff", timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "DecodeError" not in server.log


def test_grpc_logs_no_stack_trace_of_a_client_that_has_gone_and_any_other_one(caplog):
    logger = logging.getLogger("grpc._cython.cygrpc")
    for error in (cygrpc.ExecuteBatchError("execute_batch", [], []), ValueError("a fault of ours")):
        try:
            raise error
        except (cygrpc.ExecuteBatchError, ValueError):
            logger.exception("Unexpected [%s] raised", type(error).__name__)
    assert [record.args for record in caplog.records] == [("ValueError",)]


# gRPC: messages that do not come


@contextmanager
def grpc_api(loop, manager, **limits):
    """Address of a gRPC API with these limits."""

    async def start():
        server = grpc.aio.server()
        add_services(server, manager, ThreadPool(8, "grpc"), ThreadPoolExecutor(1), **limits)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, ("127.0.0.1", port)

    server, address = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield address
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result()


def call_slowly(loop, address, calls, method=GRPC_PREDICT):
    """Runs `calls` on a gRPC method whose calls begin without their message; fails after 30 s."""

    async def run():
        async with grpc.aio.insecure_channel(f"{address[0]}:{address[1]}") as channel:
            call = channel.stream_unary(method, request_serializer=bytes, response_deserializer=bytes)
            return await asyncio.wait_for(calls(call), 30)

    return asyncio.run_coroutine_threadsafe(run(), loop).result()


def http2_frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


HTTP2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, 0, b"")


def http2_predict(*streams, data=b""):
    """HTTP/2 of Predict calls without deadline: their heads, and what is there of their messages."""
    head = b"".join(
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value  # literal, not indexed
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", GRPC_PREDICT.encode()),
            (b":authority", b"localhost"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )
    sent = b""
    for stream in streams:
        sent += http2_frame(1, 4, stream, head)  # HEADERS, END_HEADERS
        if data:
            sent += http2_frame(0, 0, stream, data)
    return sent


def grpc_message(content, size=None):
    """A message, or the beginning of one that claims to have `size` bytes."""
    return b"\x00" + (len(content) if size is None else size).to_bytes(4, "big") + content


BEGINNING_OF_2_GIB = grpc_message(b"\x0a\x06\x0a", size=2**31 - 2)


def receive(connection, enough):
    """Reads until `enough` is true of all that came. The texts of errors can be read: gRPC packs none."""
    answer = b""
    while not enough(answer):
        answer += (received := connection.recv(2**16))
        assert received, "closed without a word"
    return answer


def code_of_a_call(address):
    with grpc.insecure_channel(f"{address[0]}:{address[1]}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        return stub.Predict.future(half_request([1.0]), timeout=5).code()


@pytest.mark.parametrize("data", [b"", BEGINNING_OF_2_GIB], ids=["no message", "2 GiB"])
def test_calls_whose_message_does_not_come_are_ended_and_leave_their_place(loop, echo_manager, data):
    with (
        grpc_api(loop, echo_manager, max_calls=3, message_timeout_s=1.5) as address,
        socket.create_connection(address, timeout=60) as connection,
    ):
        connection.sendall(HTTP2_START + http2_predict(1, 3, 5, 7, data=data))
        answer = receive(connection, lambda answer: answer.count(b"was not complete after 1.5 s") == 3)
        assert answer.count(b"3 calls are being answered") == 1
        # The connection is still open.
        wait_for(lambda: code_of_a_call(address) == grpc.StatusCode.OK)


def test_every_call_whose_message_does_not_come_is_ended(loop, echo_manager):
    """The loop's clock counts whole ms: calls that begin at many times meet each way in which it rounds."""

    async def calls(predict):
        async def code_of_one(start_s):
            await asyncio.sleep(start_s)
            return await predict().code()

        return await asyncio.gather(*(code_of_one(0.004 * number) for number in range(100)))

    with grpc_api(loop, echo_manager, message_timeout_s=0.05) as address:
        codes = call_slowly(loop, address, calls)
    assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 100


@pytest.mark.parametrize(
    ("method", "limit", "message"),
    [
        (GRPC_PREDICT, "max_calls", half_request([1.0])),
        (GRPC_STATUS, "max_control_calls", get_model_status_pb2.GetModelStatusRequest(model_spec=ECHO)),
    ],
    ids=["Predict", "GetModelStatus"],
)
def test_refused_calls_leave_the_limit_as_it_is(loop, echo_manager, method, limit, message):
    async def calls(begin):
        at_once = [begin() for _ in range(12)]
        codes = [asyncio.ensure_future(call.code()) for call in at_once]
        refused = [await code for code in itertools.islice(asyncio.as_completed(codes), 9)]
        held = [call for call in at_once if not call.done()]
        refused += [await begin().code() for _ in range(9)]
        for call in held:
            await call.write(message.SerializeToString())
            await call.done_writing()
        return refused, [await call.code() for call in held]

    with grpc_api(loop, echo_manager, **{limit: 3}) as address:
        refused, held = call_slowly(loop, address, calls, method)
    assert refused == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 18
    assert held == [grpc.StatusCode.OK] * 3


def test_a_server_full_of_predict_calls_tells_its_models_and_can_be_rolled_back(
    loop, echo_manager, echo_versions
):
    metadata = get_model_metadata_pb2.GetModelMetadataRequest(
        model_spec=ECHO, metadata_field=["signature_def"]
    )
    same_config = model_management_pb2.ReloadConfigRequest()
    same_config.config.model_config_list.config.add(
        name="echo", base_path=str(echo_versions), model_platform="tensorflow"
    )
    with (
        grpc_api(loop, echo_manager, max_calls=1) as address,
        socket.create_connection(address, timeout=30) as connection,
        grpc.insecure_channel(f"{address[0]}:{address[1]}") as channel,
    ):
        connection.sendall(HTTP2_START)
        streams = itertools.count(1, 2)

        def is_full():
            # Another one each time: the one before was refused if the call that asks had the place.
            connection.sendall(http2_predict(next(streams)))
            return code_of_a_call(address) == grpc.StatusCode.RESOURCE_EXHAUSTED

        wait_for(is_full)
        model = model_service_pb2_grpc.ModelServiceStub(channel)
        status = model.GetModelStatus(get_model_status_pb2.GetModelStatusRequest(model_spec=ECHO), timeout=10)
        assert status.model_version_status
        prediction = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        assert prediction.GetModelMetadata(metadata, timeout=10).metadata
        model.HandleReloadConfigRequest(same_config, timeout=10)
        assert code_of_a_call(address) == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_that_claims_two_gigabytes_does_not_get_them(server):
    host, _, port = server.grpc_target.removeprefix("grpc://").rpartition(":")
    before = psutil.Process(server.pid).memory_info()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(HTTP2_START + http2_predict(*range(1, 201, 2), data=BEGINNING_OF_2_GIB))
        # Calls of a connection are taken up in turn: when the last is refused, the others wait for messages.
        connection.sendall(http2_predict(201, data=grpc_message(b"\xff")))
        receive(connection, lambda answer: b"the message is not one that Predict takes" in answer)
        assert ask_rest(server) == [0.5]
        memory = psutil.Process(server.pid).memory_info()
    assert memory.rss < before.rss + 50 * 2**20
    assert memory.vms < before.vms + 2**30  # memory that is got and not touched; a new thread may get 100 MB


def test_a_call_that_ends_without_a_message_is_an_invalid_argument(channel):
    call = channel.stream_unary(GRPC_PREDICT, request_serializer=bytes, response_deserializer=bytes)
    with pytest.raises(grpc.RpcError, match="without a message") as caught:
        call(iter([]), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


tensors = st.builds(
    tf.make_tensor_proto(0.0).__class__,
    dtype=st.integers(0, 30),
    tensor_shape=st.builds(
        lambda sizes, unknown: {"dim": [{"size": size} for size in sizes], "unknown_rank": unknown},
        st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=4)
        | st.lists(st.just(1), min_size=30, max_size=70),
        st.booleans(),
    ),
    tensor_content=st.binary(max_size=32),
    float_val=st.lists(st.floats(width=32), max_size=4),
    string_val=st.lists(st.binary(max_size=4), max_size=4),
    int64_val=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
)


@FUZZ
@given(inputs=st.dictionaries(st.sampled_from(["x", "text", "number", "floats"]), tensors, max_size=3),
       signature=st.sampled_from(["", "half", "nothing"]))  # fmt: skip
def test_any_tensor_is_answered_or_refused(channel, inputs, signature):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "echo"
    request.model_spec.signature_name = signature
    for name, tensor in inputs.items():
        request.inputs[name].CopyFrom(tensor)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    try:
        stub.Predict(request, timeout=10)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


@pytest.mark.parametrize("dtype", [tf.float32, tf.string, tf.int64, tf.variant, tf.complex64, tf.bfloat16])
def test_a_tensor_that_claims_gigabytes_is_refused_without_them(channel, server, dtype):
    before = psutil.Process(server.pid).memory_info().rss
    request = half_request([1.0])
    proto = request.inputs["x"]
    proto.dtype = dtype.as_datatype_enum
    proto.string_val.append(b"x")
    proto.scomplex_val.extend([1.0, 0.0])
    proto.half_val.append(1)
    for sizes in ([2**27], [2**31], [2**62, 2**62], [2**20, 2**10], [0, 2**60], [1] * 33):
        del proto.tensor_shape.dim[:]
        for size in sizes:
            proto.tensor_shape.dim.add(size=size)
        with pytest.raises(grpc.RpcError) as caught:
            prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=10)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert psutil.Process(server.pid).memory_info().rss < before + 100 * 2**20


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
        # A settings frame, then a message frame that claims 4 GiB on a stream that is not open.
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        b"\x00\x00\x05\x00\x00\x00\x00\x00\x01\x00\xff\xff\xff\xff",
    ],
    ids=["zeros", "http1", "frames", "length"],
)
def test_garbage_on_the_grpc_port_is_not_answered(server, garbage):
    host, _, port = server.grpc_target.removeprefix("grpc://").rpartition(":")
    for half_close in (False, True):
        with suppress(TimeoutError):  # gRPC waits for the rest of what may yet become a frame
            answer = talk((host, int(port)), garbage, half_close=half_close, timeout_s=1)
            assert b"grpc-status" not in answer


def test_calls_beyond_a_thousand_at_once_are_refused_and_not_queued(channel):
    request = sleep_request(1.0)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    codes = [future.code() for future in [stub.Predict.future(request, timeout=5) for _ in range(1100)]]
    assert set(codes) <= {
        grpc.StatusCode.OK,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) > 0


def test_calls_cancelled_in_the_middle_leave_nothing_behind(channel):
    request = sleep_request(0.05)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    for future in [stub.Predict.future(request, timeout=10) for _ in range(100)]:
        future.cancel()
