"""Several processes behind the same two ports: a supervisor that starts them, keeps them alive and in step.

Python runs one thread at a time in a process; a server that should use several cores runs several processes.
Each worker is a whole server with models of its own and listens on the ports by SO_REUSEPORT, so the kernel
deals connections out among them. What must hold for all of them at once goes through the supervisor, over a
pipe to each: being ready, a reload of the config, and the end. Workers may be given cores of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Final, TypeAlias

import grpc

from schema.errors import ServingError
from serving.status import RequestError

logger = logging.getLogger(__name__)

# prometheus_client sums the metrics of the processes that share this folder.
METRICS_FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
_FIRST_RESTART_WAIT_S: Final = 1.0
_LAST_RESTART_WAIT_S: Final = 60.0
_KILL_AFTER_S: Final = 28.0  # the workers' own drain, and a little

# Error of a reload as a worker reports it: name of the gRPC code, and text. None: it is loaded.
_Error: TypeAlias = tuple[str, str] | None
_Apply: TypeAlias = Callable[["bytes | None", bool], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class _Ready:
    versions: str


@dataclass(frozen=True)
class _Reload:
    """A config, serialized: from a worker to the supervisor, and from there to all workers.

    None stands for what the flags say. A config that has held before is taken without a check of its labels:
    a worker may have to load it anew.
    """

    number: int
    config: bytes | None
    check_labels: bool = True


@dataclass(frozen=True)
class _Reloaded:
    number: int
    error: _Error


class WorkerLink:
    """A worker's end of the pipe. Lives on the worker's event loop.

    Args:
      connection: the pipe.
      initial_config: serialized ReloadConfigRequest that the worker starts with; None: what the flags say.
      check_labels: whether the config is new, and its version labels are to be checked.
    """

    def __init__(self, connection: Connection, initial_config: bytes | None, check_labels: bool) -> None:
        self.initial_config = initial_config
        self.check_labels = check_labels
        self._connection = connection
        self._calls: dict[int, asyncio.Future[_Error]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, apply: _Apply, supervisor_gone: Callable[[], None]) -> None:
        """Starts to take messages.

        Args:
          apply: loads a serialized config, None for that of the flags, with or without a check of its version
            labels; may raise RequestError.
          supervisor_gone: called when there is no supervisor any more.
        """

        def receive() -> None:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                asyncio.get_running_loop().remove_reader(self._connection.fileno())
                supervisor_gone()
                return
            if isinstance(message, _Reloaded):
                call = self._calls.get(message.number)
                if call is not None and not call.done():  # whoever asked may have given up
                    call.set_result(message.error)
            else:
                task = asyncio.ensure_future(self._apply(message, apply))
                self._tasks.add(task)  # the loop itself holds it weakly
                task.add_done_callback(self._tasks.discard)

        asyncio.get_running_loop().add_reader(self._connection.fileno(), receive)

    def ready(self, versions: str) -> None:
        """Tells that this worker serves."""
        self._connection.send(_Ready(versions))

    async def reload(self, config: bytes) -> None:
        """Has all workers load a serialized config. Raises RequestError: the first error of one of them."""
        number = next(self._numbers)
        self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._connection.send(_Reload(number, config))
            _raise(await self._calls[number])
        finally:
            del self._calls[number]

    async def _apply(self, message: _Reload, apply: _Apply) -> None:
        error: _Error = None
        try:
            await apply(message.config, message.check_labels)
        except RequestError as reason:
            error = (reason.code.name, str(reason))
        except Exception as reason:
            logger.exception("config cannot be loaded")
            error = (grpc.StatusCode.INTERNAL.name, f"{type(reason).__name__}: {reason}")
        self._connection.send(_Reloaded(message.number, error))


def _raise(error: _Error) -> None:
    if error is not None:
        raise RequestError(grpc.StatusCode[error[0]], error[1])


@dataclass
class _Worker:
    place: int
    process: SpawnProcess
    connection: Connection
    ready: asyncio.Future[str]
    reloads: dict[int, asyncio.Future[_Error]] = field(default_factory=dict)


class Supervisor:
    """Runs workers until it is asked to stop.

    Args:
      num_workers: how many.
      start: returns a process, not yet started, for a place and the arguments of a WorkerLink. Places are
        counted from 0; who replaces a worker has its place.
    """

    def __init__(
        self, num_workers: int, start: Callable[[int, Connection, bytes | None, bool], SpawnProcess]
    ) -> None:
        self._num_workers = num_workers
        self._start = start
        self._workers: list[_Worker] = []
        self._stopping = asyncio.Event()
        self._config: bytes | None = None
        self._numbers = itertools.count()
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, announce: Callable[[str], None]) -> int:
        """Starts the workers and keeps them running until SIGTERM or SIGINT.

        Args:
          announce: called once all workers serve, with what the first one serves.

        Returns:
          Exit code: 0 after a clean stop, 1 when a worker cannot start.
        """
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._stopping.set)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            # The first one alone: what is wrong with the models is then said once, not by every worker.
            versions: list[str] = []
            for number in (1, self._num_workers - 1):
                async with self._reloading:
                    started = [self._add_worker(check_labels=not versions) for _ in range(number)]
                serving = asyncio.gather(*(worker.ready for worker in started))
                await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
                if self._stopping.is_set():
                    serving.cancel()
                    return 0
                versions = (await serving)[:1] or versions
            announce(versions[0])
            await stopping
            return 0
        except ServingError as error:
            logger.error("%s", error)
            return 1
        finally:
            self._stopping.set()
            await self._stop_workers()

    def _add_worker(self, *, check_labels: bool) -> _Worker:
        loop = asyncio.get_running_loop()
        ours, theirs = multiprocessing.Pipe()
        place = min(set(range(self._num_workers)) - {worker.place for worker in self._workers})
        process = self._start(place, theirs, self._config, check_labels)
        process.start()
        theirs.close()
        worker = _Worker(place, process, ours, loop.create_future())
        self._workers.append(worker)
        loop.add_reader(ours.fileno(), self._receive, worker)
        loop.add_reader(process.sentinel, self._ended, worker)
        return worker

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # it has ended; its sentinel tells
            asyncio.get_running_loop().remove_reader(worker.connection.fileno())
            return
        if isinstance(message, _Ready):
            worker.ready.set_result(message.versions)
        elif isinstance(message, _Reloaded):
            worker.reloads.pop(message.number).set_result(message.error)
        else:
            self._run(self._reload(worker, message))

    def _ended(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(worker.process.sentinel)
        loop.remove_reader(worker.connection.fileno())
        worker.connection.close()
        worker.process.join()
        self._workers.remove(worker)
        for reload in worker.reloads.values():
            reload.set_result(
                (grpc.StatusCode.UNAVAILABLE.name, f"worker pid={worker.process.pid} ended during the reload")
            )
        was_ready = worker.ready.done()
        if not was_ready:
            worker.ready.set_exception(
                ServingError(
                    f"worker pid={worker.process.pid} ended with exit code {worker.process.exitcode} "
                    "before it could serve; its own log tells why"
                )
            )
            worker.ready.exception()  # nobody may be waiting for it
        elif not self._stopping.is_set():
            logger.error(
                "worker pid=%s ended with exit code %s: starting another",
                *(worker.process.pid, worker.process.exitcode),
            )
            self._run(self._replace())

    async def _replace(self) -> None:
        wait_s = _FIRST_RESTART_WAIT_S
        while not self._stopping.is_set():
            async with self._reloading:  # not while it is open which config holds
                if self._stopping.is_set():
                    return
                worker = self._add_worker(check_labels=False)
            try:
                await worker.ready
                logger.info("worker pid=%s serves", worker.process.pid)
                return
            except ServingError as error:
                logger.error("%s: trying again in %.0f s", error, wait_s)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            wait_s = min(2 * wait_s, _LAST_RESTART_WAIT_S)

    async def _reload(self, asking: _Worker, message: _Reload) -> None:
        async with self._reloading:  # one config after the other, in the same order for all
            error = await self._load_everywhere(message.config, check_labels=True)
            if error is None or error[0] == grpc.StatusCode.UNKNOWN.name:  # it holds for all other models
                self._config = message.config
            else:  # some may have taken it over
                again = await self._load_everywhere(self._config, check_labels=False)
                if again is not None:
                    logger.error("a worker cannot go back to the config before: %s", again[1])
        with contextlib.suppress(OSError):  # the one that asked may be gone
            asking.connection.send(_Reloaded(message.number, error))

    async def _load_everywhere(self, config: bytes | None, *, check_labels: bool) -> _Error:
        """Has all workers load a config; returns the error of one, UNKNOWN only if no other."""
        number, answers = next(self._numbers), []
        for worker in self._workers:
            worker.reloads[number] = asyncio.get_running_loop().create_future()
            answers.append(worker.reloads[number])
            # One that has just ended is told of by its sentinel, which answers for it.
            with contextlib.suppress(OSError):
                worker.connection.send(_Reload(number, config, check_labels))
        errors = [error for error in await asyncio.gather(*answers) if error is not None]
        return min(errors, key=lambda error: error[0] == grpc.StatusCode.UNKNOWN.name, default=None)

    async def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _KILL_AFTER_S
        while self._workers and loop.time() < deadline:
            await asyncio.sleep(0.05)
        for worker in self._workers:
            logger.error("worker pid=%s did not stop: killed", worker.process.pid)
            worker.process.kill()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself holds it weakly
        task.add_done_callback(self._tasks.discard)


@contextlib.contextmanager
def shared_metrics() -> Iterator[None]:
    """Has processes started inside sum their metrics."""
    with tempfile.TemporaryDirectory(prefix="funnel-metrics-") as folder:
        os.environ[METRICS_FOLDER_VARIABLE] = folder
        yield


def reserve_port(host: str, port: int) -> socket.socket:
    """Returns a socket that holds a port for processes that listen on it with SO_REUSEPORT; 0: any free port.

    Raises:
      OSError: the port is taken, by whomever.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # A socket without the option tells whether somebody else, with or without it, has the port.
    with socket.create_server((host, port), family=family) as probe:
        port = probe.getsockname()[1]
    reserved = socket.socket(family)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            reserved.bind((host, port))
        except (
            OSError
        ):  # connections of a server that has just ended; with this, a probe overlooks the socket
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind((host, port))
    except OSError:
        reserved.close()
        raise
    return reserved
