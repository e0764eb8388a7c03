"""What the speed benchmark makes of the words of its load generators, and what it refuses."""

from pathlib import Path

import click
import pytest

from benchmarks import serving

ANSWER = b"x" * 95  # 100 bytes on the wire with gRPC's prefix


def h2load(monkeypatch, succeeded, data_bytes, times_us):
    """Runs `serving.h2load` with a generator that reports this."""

    def run(command):
        (log,) = (item.removeprefix("--log-file=") for item in command if item.startswith("--log-file="))
        Path(log).write_text("".join(f"17\t200\t{time}\n" for time in times_us))
        return (
            f"requests: {succeeded} total, {succeeded} started, {succeeded} succeeded, 0 failed\n"
            f"traffic: 1.00KB (1024) total, 100B (100) headers (saved 90%), 2KB ({data_bytes}) data\n"
        )

    monkeypatch.setattr(serving, "_output", run)
    return serving.h2load("grpc://127.0.0.1:1", "/echo/Echo", b"message", ANSWER, clients=1, seconds=2)


def wrk(monkeypatch, output):
    monkeypatch.setattr(serving, "_output", lambda command: output)
    return serving.wrk("http://127.0.0.1:1", "/echo", b"{}", ANSWER, connections=1, seconds=2)


def test_grpc_load_is_read_with_its_percentiles(monkeypatch):
    load = h2load(monkeypatch, 100, 100 * 100, [1_000] * 98 + [5_000, 9_000])
    assert load == serving.Load(100, 50.0, 1.0, 9.0)


@pytest.mark.parametrize("succeeded, data_bytes", [(100, 40 * 100), (0, 0), (100, 300 * 100)])
def test_grpc_answers_of_another_size_are_no_answers(monkeypatch, succeeded, data_bytes):
    # An error over gRPC is HTTP 200 as well, without a message.
    with pytest.raises(click.ClickException, match=f"expected {succeeded} answers of 100 bytes"):
        h2load(monkeypatch, succeeded, data_bytes, [1_000])


def test_calls_in_flight_at_the_end_may_have_brought_bytes(monkeypatch):
    assert h2load(monkeypatch, 100, 103 * 100, [1_000] * 100).num_requests == 100


def test_rest_load_is_read_and_wrong_answers_stop_the_benchmark(monkeypatch):
    load = wrk(monkeypatch, "wrong 0\ndone 500\np50 1500\np99 7000\n")
    assert load == serving.Load(500, 250.0, 1.5, 7.0)
    with pytest.raises(click.ClickException, match=r"3 answers of .* not as expected"):
        wrk(monkeypatch, "wrong 3\ndone 500\np50 1500\np99 7000\n")


def test_a_row_is_compared_with_its_echo_and_its_model_in_process(capsys):
    def result(name, rate, p50_ms):
        return serving.Result(name, rate, p50_ms, 2 * p50_ms, 1.0)

    serving._print_ratios(
        [
            result("floor: retrieval-9x4 in process, batch 1", 2_000, 0.5),
            result("floor: plain-9x4 in process, batch 1", 8_000, 0.1),
            result("floor: gRPC echo, 16 clients", 4_000, 1.0),
            result("gRPC retrieval, 16 clients", 1_000, 2.0),
        ]
    )
    assert capsys.readouterr().out == (
        "gRPC retrieval, 16 clients: 0.25 of the echo's rate, "
        "4.00 times the p50 of the signature in process\n"
    )
