"""Work that takes long tells how far it has come, and does the same whether it tells or not."""

from __future__ import annotations

import logging

import pytest

from trainer import progress
from trainer.progress import ATTRIBUTE, Progress


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, in seconds, in a list of one."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def _told(caplog: pytest.LogCaptureFixture) -> list[Progress]:
    return [getattr(record, ATTRIBUTE) for record in caplog.records if record.name == progress.logger.name]


def test_batches_cover_everything_once_and_the_last_may_be_smaller() -> None:
    assert list(progress.batches(7, 3, "users")) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(progress.batches(0, 3, "users")) == []


def test_every_second_and_at_the_end_it_is_told_how_many_are_done(
    now_s: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, progress.logger.name):
        for _ in progress.batches(10_000, 1_000, "users ranked"):
            now_s[0] += 0.4
    told = [Progress(done, 10_000, "users ranked") for done in (3_000, 6_000, 9_000, 10_000)]
    assert _told(caplog) == told
    assert caplog.messages[0] == "3,000 of 10,000 users ranked (30 %)"
    assert caplog.messages[-1] == "10,000 of 10,000 users ranked (100 %)"


def test_work_that_breaks_off_is_not_told_to_be_done(
    now_s: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, progress.logger.name):
        for batch in progress.batches(10, 1, "users ranked"):
            now_s[0] += 2
            if batch.start == 2:
                break
    assert _told(caplog) == [Progress(1, 10, "users ranked"), Progress(2, 10, "users ranked")]


def test_work_that_is_done_in_a_second_tells_nothing(
    now_s: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, progress.logger.name):
        assert list(progress.tracked("abc", "letters")) == ["a", "b", "c"]
    assert not caplog.records


def test_things_that_are_tracked_count_one_each(now_s: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, progress.logger.name):
        for _ in progress.tracked(["popularity", "iALS", "item-kNN"], "baselines fitted"):
            now_s[0] += 2
    assert _told(caplog) == [Progress(done, 3, "baselines fitted") for done in (1, 2, 3)]
