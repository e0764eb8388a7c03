"""What makes the fuzz of the model server fail."""

from collections import Counter

import pytest

from benchmarks.fuzz import _problems

HALF = (600.0, 20, 30)
HARMLESS = Counter({"rest 200": 1, "rest 400": 9, "grpc INVALID_ARGUMENT": 3, "grpc garbage": 1})


def problems(last=HALF, answers=HARMLESS, log=""):
    first = [(500.0, 18, 20)] * 4
    return _problems(answers, [*first, HALF, *[HALF] * 4, last], log)


def test_refused_requests_and_growth_before_half_of_the_time_are_no_problem():
    assert problems() == []
    assert problems(last=(630.0, 30, 34)) == []


@pytest.mark.parametrize("answer", ["rest 500", "grpc INTERNAL", "grpc UNKNOWN", "grpc UNAVAILABLE"])
def test_an_error_of_the_servers_own_is_one(answer):
    assert problems(answers=HARMLESS + Counter({answer: 2})) == [f"{answer}: 2"]


@pytest.mark.parametrize(
    ("last", "complaint"),
    [
        ((631.0, 20, 30), "31 more MB"),
        ((600.0, 31, 30), "11 more files"),
        ((600.0, 20, 35), "5 more threads"),
    ],
)
def test_growth_over_the_second_half_is_one(last, complaint):
    (problem,) = problems(last=last)
    assert problem.startswith(complaint)


def test_a_stack_trace_in_the_log_is_one():
    (problem,) = problems(log="12:00 INFO fine\nTraceback (most recent call last):\n  File")
    assert "Traceback (most recent call last)" in problem
