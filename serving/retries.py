"""When a request is sent again: rarely, late enough, and never so often that a server in trouble drowns."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from schema.errors import ConfigError
from serving.transport import OverloadedError, ServerUnavailableError

_LOGGER = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

# A request that fails costs a token, one that is answered earns a tenth; none is repeated while the budget
# is at most half full. Rule and figures are those of gRPC's retry throttling (proposal A6).
_BUDGET_TOKENS: Final = 10.0
_TOKENS_PER_ANSWER: Final = 0.1


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how late a request is repeated that the server did not take.

    The n-th wait is drawn evenly from 0 to `initial_backoff_s` · 2^(n-1), at most `max_backoff_s`.

    Attributes:
      max_attempts: requests in all, the first included, at least 1; 1 never repeats one.
      initial_backoff_s: seconds, above 0.
      max_backoff_s: seconds, at least `initial_backoff_s`.

    Raises:
      ConfigError: a value outside its range.
    """

    max_attempts: int = 3
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 1.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or not 0 < self.initial_backoff_s <= self.max_backoff_s:
            raise ConfigError(
                f"expected max_attempts >= 1 and 0 < initial_backoff_s <= max_backoff_s, got {self}"
            )


class Retrier:
    """Repeats requests by a policy. Safe to share between threads.

    Only ServerUnavailableError is repeated: the server was not reached, or refused before it began. A model
    changes nothing by answering, so that a request which was perhaps received may be sent again. Other
    errors would come again (a bad request) or have used up the time (a deadline); OverloadedError says that
    the server wants no more.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._tokens = _BUDGET_TOKENS
        self._lock = threading.Lock()

    def call(self, request: Callable[[], _Answer], deadline: float) -> _Answer:
        """Returns the first answer of `request`.

        Args:
          request: sends one request; called `max_attempts` times at most.
          deadline: `time.monotonic()` by which the last wait must be over.

        Raises:
          What the last request raised.
        """
        attempt = 1
        while True:
            try:
                answer = request()
            except ServerUnavailableError as error:
                longest_s = self._policy.initial_backoff_s * 2 ** (attempt - 1)
                wait_s = random.uniform(0, min(longest_s, self._policy.max_backoff_s))
                if (
                    not self._may_repeat_after(error)
                    or attempt == self._policy.max_attempts
                    or time.monotonic() + wait_s >= deadline
                ):
                    raise
                _LOGGER.info("retry=%d wait_s=%.3f: %s", attempt, wait_s, error)
                time.sleep(wait_s)
                attempt += 1
            else:
                with self._lock:
                    self._tokens = min(_BUDGET_TOKENS, self._tokens + _TOKENS_PER_ANSWER)
                return answer

    def _may_repeat_after(self, error: ServerUnavailableError) -> bool:
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1)
            return self._tokens > _BUDGET_TOKENS / 2 and not isinstance(error, OverloadedError)
