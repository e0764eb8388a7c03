"""Dynamic batching: requests that arrive together run together, as in TensorFlow Serving's BatchingSession.

A request waits in the batch of its model version, signature and shape. A batch is ready once it is full or
its time is over; until a thread takes it, it goes on collecting. So an idle server adds no more than the
timeout, and a busy one makes larger batches by itself.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from serving import metrics
from serving.batching_config import BatchingParameters
from serving.servable import DEFAULT_SIGNATURE, Servable
from serving.status import RequestError, invalid_argument

logger = logging.getLogger(__name__)

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
_Answer = TypeVar("_Answer")


@dataclass
class _Task:
    """One request, since when it waits on the clock of time.perf_counter(), and where its answer goes.

    `answer` gets what `encode` makes of the outputs that the filter names, or the error.
    """

    inputs: Arrays
    num_rows: int
    encode: Callable[[Arrays], Any]
    output_filter: Sequence[str]
    answer: asyncio.Future[Any]
    submitted_s: float


@dataclass
class _Batch:
    """Requests that will run together."""

    key: tuple[Hashable, ...]
    servable: Servable
    signature_name: str
    tasks: list[_Task] = field(default_factory=list)
    num_rows: int = 0
    is_ready: bool = False


class Batcher:
    """Gathers requests into batches and runs them in threads. Belongs to the event loop it is made on.

    Args:
      parameters: sizes, timeout and limits.
      executor: threads that run batches; at least `parameters.num_batch_threads`.
      call_later: (seconds, callback) -> anything; the clock, the loop's own by default.
    """

    def __init__(
        self,
        parameters: BatchingParameters,
        executor: Executor,
        call_later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self._parameters = parameters
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._call_later = call_later or self._loop.call_later
        self._num_free = parameters.num_batch_threads
        self._open: dict[Hashable, _Batch] = {}
        self._num_waiting: Counter[Hashable] = Counter()  # by queue: model version and signature
        self._ready: deque[_Batch] = deque()

    def submit(
        self,
        servable: Servable,
        signature_name: str,
        inputs: Arrays,
        encode: Callable[[Arrays], _Answer],
        output_filter: Sequence[str] = (),
    ) -> asyncio.Future[_Answer]:
        """Runs one request with others of its signature: the arguments and errors of Servable.predict.

        Args:
          encode: makes the answer of what Servable.predict returns, in the thread of the batch, where it does
            not hold up the event loop.

        Returns:
          A future of the answer, or of what Servable.predict or `encode` raises; a request whose future was
          cancelled does not run any more.

        Raises:
          RequestError: also INVALID_ARGUMENT for inputs without a common first dimension or with more rows
            than max_batch_size, UNAVAILABLE when too many batches wait; and, by the future,
            FAILED_PRECONDITION when an output of the signature does not have one row per row of input.
        """
        servable.check(signature_name, inputs, output_filter)
        answer: asyncio.Future[_Answer] = self._loop.create_future()
        num_rows = self._num_rows(inputs)
        task = _Task(inputs, num_rows, encode, output_filter, answer, time.perf_counter())
        self._enqueue(task, servable, signature_name or DEFAULT_SIGNATURE)
        return answer

    def _num_rows(self, inputs: Arrays) -> int:
        if not inputs:
            raise invalid_argument("Batching Run() must have at least one input tensor")
        if any(array.ndim == 0 for array in inputs.values()):
            raise invalid_argument("Batching Run() input tensors must have at least one dimension")
        sizes = {len(array) for array in inputs.values()}
        if len(sizes) > 1:
            raise invalid_argument(
                "Batching Run() input tensors must have equal 0th-dimension size, got "
                + ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            )
        (num_rows,) = sizes
        if num_rows > self._parameters.max_batch_size:
            raise invalid_argument(
                f"Task size {num_rows} is larger than maximum input batch size "
                f"{self._parameters.max_batch_size}"
            )
        return num_rows

    def _enqueue(self, task: _Task, servable: Servable, signature_name: str) -> None:
        key = self._key(task, servable, signature_name)
        batch = self._open.get(key)
        if batch is None or batch.num_rows + task.num_rows > self._parameters.max_batch_size:
            if self._num_waiting[key[:2]] >= self._parameters.max_enqueued_batches:
                raise RequestError(
                    grpc.StatusCode.UNAVAILABLE,
                    "The batch scheduling queue to which this task was submitted is full",
                )
            if batch is not None:
                self._make_ready(batch)
            batch = _Batch(key, servable, signature_name)
            self._open[key] = batch
            self._num_waiting[key[:2]] += 1
            self._call_later(self._parameters.batch_timeout_s, functools.partial(self._time_is_over, batch))
        batch.tasks.append(task)
        batch.num_rows += task.num_rows
        if batch.num_rows == self._parameters.max_batch_size:
            self._make_ready(batch)

    def _key(self, task: _Task, servable: Servable, signature_name: str) -> tuple[Hashable, ...]:
        """Requests with the same key may share a batch. A model version is told by its identity."""
        if self._parameters.pad_variable_length_inputs:
            shapes: Any = tuple(sorted((name, array.ndim) for name, array in task.inputs.items()))
        else:
            shapes = tuple(sorted((name, array.shape[1:]) for name, array in task.inputs.items()))
        return (id(servable), signature_name, shapes)

    def _time_is_over(self, batch: _Batch, num_rows: int = 0) -> None:
        """Makes a batch ready once the loop has taken in the requests that have arrived already.

        It takes them in one by one: without this, of requests that arrive together the first would run alone.
        Each look adds a request, so that there are at most as many as the batch holds.
        """
        if batch.num_rows > num_rows:
            self._call_later(0, functools.partial(self._time_is_over, batch, batch.num_rows))
        else:
            self._make_ready(batch)

    def _make_ready(self, batch: _Batch) -> None:
        if not batch.is_ready:
            batch.is_ready = True
            self._ready.append(batch)
            self._start_batches()

    def _start_batches(self) -> None:
        while self._num_free and self._ready:
            batch = self._ready.popleft()
            if self._open.get(batch.key) is batch:
                del self._open[batch.key]
            self._num_waiting[batch.key[:2]] -= 1
            if not self._num_waiting[batch.key[:2]]:
                del self._num_waiting[batch.key[:2]]
            tasks = [task for task in batch.tasks if not task.answer.cancelled()]
            if tasks:
                self._num_free -= 1
                self._executor.submit(self._run_in_thread, batch, tasks)

    def _run_in_thread(self, batch: _Batch, tasks: list[_Task]) -> None:
        started_s = time.perf_counter()
        try:
            metrics.record_queuing(started_s - task.submitted_s for task in tasks)
            results = self._run(batch, tasks)
        except Exception as error:
            logger.exception("batch failed model=%s version=%d", batch.servable.name, batch.servable.version)
            results = [error] * len(tasks)
        answers = [_encode(task, result) for task, result in zip(tasks, results, strict=True)]
        self._loop.call_soon_threadsafe(self._finish, tasks, answers)

    def _finish(self, tasks: list[_Task], answers: list[Any]) -> None:
        self._num_free += 1
        self._start_batches()
        for task, answer in zip(tasks, answers, strict=True):
            if task.answer.cancelled():
                continue
            if isinstance(answer, Exception):
                task.answer.set_exception(answer)
            else:
                task.answer.set_result(answer)

    def _run(self, batch: _Batch, tasks: list[_Task]) -> list[Arrays | Exception]:
        """Results in the order of the tasks.

        One bad request must not fail its neighbours: what fails together runs again in halves, until the
        request that is to blame is alone.
        """
        num_rows = sum(task.num_rows for task in tasks)
        size = self._parameters.filled_up(num_rows)
        inputs = _joined([task.inputs for task in tasks], size - num_rows)
        metrics.record_batch(num_rows, size)
        try:
            outputs = batch.servable.predict(batch.signature_name, inputs)
        except RequestError as error:
            if len(tasks) == 1:
                return [error]
            half = len(tasks) // 2
            return self._run(batch, tasks[:half]) + self._run(batch, tasks[half:])
        for name, array in outputs.items():
            if array.ndim == 0 or len(array) != len(next(iter(inputs.values()))):
                misfit = RequestError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes "
                    f"of the input tensors: output {name!r} has shape {list(array.shape)} for {size} rows",
                )
                return [misfit] * len(tasks)
        ends = np.cumsum([task.num_rows for task in tasks])
        return [
            {name: array[end - task.num_rows : end] for name, array in outputs.items()}
            for task, end in zip(tasks, ends, strict=True)
        ]


def _encode(task: _Task, result: Arrays | Exception) -> Any:
    """The answer to a request, or the error, which must not fail its neighbours."""
    if isinstance(result, Exception):
        return result
    try:
        return task.encode({name: result[name] for name in task.output_filter or result})
    except Exception as error:
        return error


def _joined(parts: Sequence[Arrays], num_missing_rows: int) -> dict[str, npt.NDArray[Any]]:
    """Concatenates inputs by name, padded to one shape, with `num_missing_rows` more rows like the first."""
    joined = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if len({array.shape[1:] for array in arrays}) > 1:
            sizes = np.max([array.shape[1:] for array in arrays], axis=0)
            arrays = [_padded(array, sizes) for array in arrays]
        if num_missing_rows:
            first = next((array[:1] for array in arrays if len(array)), None)
            if first is not None:  # there may be no row at all
                arrays.extend([first] * num_missing_rows)
        joined[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return joined


def _padded(array: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Padded at the end of each dimension after the first with its first element, if it has one."""
    filler = array.flat[0] if array.size else b"" if array.dtype == object else 0
    padded = np.full((len(array), *sizes), filler, array.dtype)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded
