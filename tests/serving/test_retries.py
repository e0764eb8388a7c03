"""Requests are repeated where that is safe and helps, in time, and never against a server in trouble."""

import socket
import threading
import time

import pytest

from schema.errors import ConfigError, ServingError
from serving import retries
from serving.retries import Retrier, RetryPolicy
from serving.transport import (
    BadRequestError,
    DeadlineExceededError,
    OverloadedError,
    ServerUnavailableError,
    open_transport,
)


class Server:
    """Raises the errors one after another, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.num_requests = 0

    def __call__(self):
        self.num_requests += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@pytest.fixture
def waits(monkeypatch):
    """Seconds of every wait; nothing waits, and each wait is the longest that the policy allows."""
    slept = []
    monkeypatch.setattr(retries.time, "sleep", slept.append)
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: high)
    return slept


def in_a_minute():
    return time.monotonic() + 60


def test_an_unavailable_server_is_asked_again_after_growing_waits(waits):
    server = Server(*[ServerUnavailableError("down")] * 3)
    policy = RetryPolicy(max_attempts=4, initial_backoff_s=0.05, max_backoff_s=0.15)
    assert Retrier(policy).call(server, in_a_minute()) == "answer"
    assert waits == [0.05, 0.1, 0.15]


def test_waits_are_drawn_from_zero_to_the_longest(monkeypatch):
    drawn = []
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(retries.random, "uniform", lambda *bounds: drawn.append(bounds) or 0.0)
    Retrier(RetryPolicy()).call(Server(*[ServerUnavailableError("down")] * 2), in_a_minute())
    assert drawn == [(0, 0.05), (0, 0.1)]


def test_the_last_error_comes_out_when_all_attempts_failed(waits):
    server = Server(*[ServerUnavailableError(f"down {i}") for i in range(9)])
    with pytest.raises(ServerUnavailableError, match="down 2"):
        Retrier(RetryPolicy(max_attempts=3)).call(server, in_a_minute())
    assert server.num_requests == 3


@pytest.mark.parametrize(
    "error", [DeadlineExceededError, BadRequestError, OverloadedError, ServingError], ids=lambda e: e.__name__
)
def test_other_errors_are_never_repeated(waits, error):
    server = Server(error("no"))
    with pytest.raises(error):
        Retrier(RetryPolicy()).call(server, in_a_minute())
    assert (server.num_requests, waits) == (1, [])


def test_no_wait_goes_beyond_the_deadline(waits):
    server = Server(ServerUnavailableError("down"))
    with pytest.raises(ServerUnavailableError):
        Retrier(RetryPolicy(initial_backoff_s=0.5)).call(server, time.monotonic() + 0.4)
    assert waits == []


def test_a_server_that_stays_down_is_soon_asked_once_a_call_only(waits):
    retrier = Retrier(RetryPolicy(max_attempts=3))
    down = Server(*[ServerUnavailableError("down")] * 100)

    def num_requests():
        before = down.num_requests
        with pytest.raises(ServerUnavailableError):
            retrier.call(down, in_a_minute())
        return down.num_requests - before

    # Ten tokens; a repeat needs more than five left: 9 8 7 | 6 5 | 4 | ...
    assert [num_requests() for _ in range(4)] == [3, 2, 1, 1]
    up = Server()
    for _ in range(40):  # 3 tokens left, and 4 more from 40 answers
        retrier.call(up, in_a_minute())
    assert num_requests() == 2  # 6 5


@pytest.mark.parametrize(
    "values", [{"max_attempts": 0}, {"initial_backoff_s": 0}, {"max_backoff_s": 0.01}], ids=str
)
def test_a_policy_without_sense_is_refused(values):
    with pytest.raises(ConfigError, match="max_attempts >= 1"):
        RetryPolicy(**values)


STATUS = b'{"model_version_status": [{"version": "1", "state": "AVAILABLE"}]}'


def test_a_dropped_connection_and_a_busy_answer_are_tried_again_over_real_sockets():
    replies = iter(
        [
            b"",  # accepted, then closed without a word
            b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(STATUS), STATUS),
        ]
    )
    asked = []

    def serve(listener):
        for reply in replies:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(65536))
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        transport = open_transport(f"http://127.0.0.1:{listener.getsockname()[1]}")
        retrier = Retrier(RetryPolicy(max_attempts=3, initial_backoff_s=0.01))
        versions = retrier.call(lambda: transport.available_versions("retrieval", 10.0), in_a_minute())
        thread.join()
        transport.close()
    assert versions == [1]
    assert [request.split()[1] for request in asked] == [b"/v1/models/retrieval"] * 3


def test_a_connection_that_the_server_ends_between_two_requests_is_replaced():
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(STATUS), STATUS)
    replies = [[answer], [answer, b""], [answer]]  # of each connection, which is closed after the last
    asked, closed = [], threading.Event()

    def serve(listener):
        for of_connection in replies:
            connection, _ = listener.accept()
            with connection:
                for reply in of_connection:
                    asked.append(connection.recv(65536))
                    connection.sendall(reply)
            closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        transport = open_transport(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert transport.available_versions("retrieval", 10.0) == [1]
        assert closed.wait(10)
        assert transport.available_versions("retrieval", 10.0) == [1], "no request went to the closed one"
        retrier = Retrier(RetryPolicy(initial_backoff_s=0.01))
        versions = retrier.call(lambda: transport.available_versions("retrieval", 10.0), in_a_minute())
        thread.join()
        transport.close()
    assert versions == [1]
    assert len(asked) == 4
