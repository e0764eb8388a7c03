"""How far work that takes long has come, told in the log; a terminal makes a bar of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

# A bar that moves once a second is alive, and a log of that many lines can be read.
_INTERVAL_S = 1.0
# Attribute of a log record that holds its `Progress`.
ATTRIBUTE = "progress"

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """So many of all the things of some work are done.

    Attributes:
      done, total: numbers of things; where they are equal, the work is over.
      what: the things, plural, and what is done to them: "users ranked".
    """

    done: int
    total: int
    what: str

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.what} ({100 * self.done / self.total:.0f} %)"


def batches(total: int, size: int, what: str) -> Iterator[slice]:
    """Cuts things into batches, and tells how many are done: once a second at most, and at the end.

    Work that is over within a second tells nothing, not even its end.

    Args:
      total: number of the things.
      size: number of those in a batch; the last may be smaller.
      what: see `Progress`.

    Yields:
      The place of each batch among all, in order.
    """
    told_s, has_told = time.monotonic(), False
    for start in range(0, total, size):
        if time.monotonic() - told_s > _INTERVAL_S:
            told_s, has_told = time.monotonic(), True
            _tell(Progress(start, total, what))
        yield slice(start, min(start + size, total))
    if has_told:
        _tell(Progress(total, total, what))


def tracked(things: Sequence[_T], what: str) -> Iterator[_T]:
    """The things, one by one; tells how many are done as `batches` does."""
    for one in batches(len(things), 1, what):
        yield things[one.start]


def _tell(progress: Progress) -> None:
    logger.info("%s", progress, extra={ATTRIBUTE: progress})
