"""Threads that run blocking calls for the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

_Answer = TypeVar("_Answer")


class ThreadPool:
    """Runs calls in threads. Belongs to the event loop it is made on, and lives as long as the process.

    As `loop.run_in_executor` with a ThreadPoolExecutor, without the second future, with its lock and its
    callbacks, that these put behind the first: a lone gRPC client waits a tenth less for its answer.

    Args:
      max_threads: how many calls may run at the same time; more wait, the first come first.
      name: of the threads.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_threads = max_threads
        self._name = name
        self._num_threads = 0
        self._num_calls = 0  # that wait or run
        self._calls: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]] = SimpleQueue()

    def submit(self, call: Callable[[], _Answer]) -> asyncio.Future[_Answer]:
        """Has a thread make a call; to be called on the event loop.

        Returns:
          A future of what the call returns or raises. A call whose future is cancelled before a thread has
          taken it is not made.

        Raises:
          RuntimeError: the system gives no thread, and there is none yet.
        """
        if self._num_threads < min(self._num_calls + 1, self._max_threads):
            try:
                name = f"{self._name}_{self._num_threads + 1}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
                self._num_threads += 1
            except RuntimeError:
                if self._num_threads == 0:
                    raise
        answer: asyncio.Future[_Answer] = self._loop.create_future()
        self._calls.put((call, answer))
        self._num_calls += 1
        return answer

    def _run(self) -> None:
        while True:
            call, answer = self._calls.get()
            result: Any = None
            error: BaseException | None = None
            if not answer.cancelled():
                try:
                    result = call()
                except StopIteration as raised:  # which no future takes
                    error = RuntimeError(f"a call raised {raised!r}")
                except BaseException as raised:
                    error = raised
            try:
                self._loop.call_soon_threadsafe(self._finish, answer, result, error)
            except RuntimeError:  # the loop is closed
                return
            del call, answer, result, error  # a thread that waits must hold nothing of its last call

    def _finish(self, answer: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._num_calls -= 1
        if answer.cancelled():
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)
