"""The versions of one model: which are loaded, when they are replaced, and what is known about each."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import tensorflow as tf
from tensorflow_serving.apis import get_model_status_pb2

from serving import metrics
from serving.config import ModelConfig, VersionPolicy
from serving.servable import Servable
from serving.status import RequestError, code_from_number, not_found
from serving.versions import find_versions
from serving.warmup import replay_warmup_requests

logger = logging.getLogger(__name__)

State = get_model_status_pb2.ModelVersionStatus.State

_FileStats = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class LoadSettings:
    """How versions are loaded.

    Args:
      max_num_retries: tries after the first that failed.
      retry_interval_s: seconds between tries.
      num_warmup_iterations: how often each warm-up record is replayed; 0 replays none.
    """

    max_num_retries: int = 5
    retry_interval_s: float = 60.0
    num_warmup_iterations: int = 1


@dataclass(frozen=True)
class VersionStatus:
    """State of one version; `code` and `message` tell why the last try to load it failed."""

    state: int
    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""


@dataclass(frozen=True)
class _Failure:
    files: _FileStats
    num_tries: int
    time_s: float


class Model:
    """The versions of one model that are loaded, by the version policy of its config.

    One thread at a time may call `refresh`, `load` and `unload`; all others may be called from any thread.
    """

    def __init__(self, config: ModelConfig, settings: LoadSettings) -> None:
        self.config = config
        self._settings = settings
        # Replaced whole, never changed in place: requests read them without a lock.
        self._loaded: dict[int, Servable] = {}
        self._statuses: dict[int, VersionStatus] = {}
        self._on_disk: set[int] = set()  # at the last look
        self._failures: dict[int, _Failure] = {}
        self._status_lock = threading.Lock()

    @property
    def name(self) -> str:
        """Model name in requests."""
        return self.config.name

    def refresh(self) -> None:
        """Brings what is loaded in line with the version policy and what is on disk: `load`, then `unload`.

        Raises:
          OSError: the folder cannot be read; what is loaded stays.
        """
        self.unload(self.load(self.config.policy))

    def load(self, policy: VersionPolicy) -> set[int]:
        """Loads what a version policy wants of what is on disk.

        A version that does not load makes place for the next older one, is tried again later or once its
        files change, and never costs a version that serves. When no version is left on disk the loaded ones
        stay.

        Returns:
          Loaded versions that the policy does not want, to `unload`: none unless one that it wants is there.

        Raises:
          OSError: the folder cannot be read.
        """
        found = find_versions(self.config.base_path)
        served: list[int] = []
        for version in policy.candidates(found):
            if policy.limit is not None and len(served) == policy.limit:
                break
            if version in self._loaded or self._try_to_load(version, found[version]):
                served.append(version)
        self._on_disk = set(found)
        self._forget(self._on_disk | set(self._loaded))
        return set(self._loaded) - set(served) if served else set()

    def unload(self, versions: set[int]) -> None:
        """Unloads versions, once no label names them."""
        if not versions:
            return
        self._loaded = {v: servable for v, servable in self._loaded.items() if v not in versions}
        for version in versions:
            self._set_status(version, VersionStatus(State.END))
        self._forget(self._on_disk | set(self._loaded))
        _free_memory()
        logger.info("unloaded model=%s versions=%s serving=%s", self.name, sorted(versions), self.versions())

    def servable(self, version: int | None) -> Servable:
        """Returns the loaded version asked for, or the newest one.

        Raises:
          RequestError: NOT_FOUND.
        """
        loaded = self._loaded
        if version is None and loaded:
            return loaded[max(loaded)]
        if version is not None and version in loaded:
            return loaded[version]
        wanted = "any version" if version is None else f"version {version}"
        available = ", ".join(map(str, sorted(loaded))) or "none"
        raise not_found(f"Servable not found: {wanted} of model {self.name}; loaded: {available}")

    def versions(self) -> list[int]:
        """Returns the loaded versions, oldest first."""
        return sorted(self._loaded)

    def statuses(self) -> dict[int, VersionStatus]:
        """Returns the state of each version that is loaded, or on disk and was tried, newest first."""
        with self._status_lock:
            return dict(sorted(self._statuses.items(), reverse=True))

    def failures(self) -> str:
        """Returns, for an error text, why versions could not be loaded."""
        reasons = (
            f"version {v}: {status.message}" for v, status in self.statuses().items() if status.message
        )
        return "; ".join(reasons) or "there is none that the version policy allows"

    def _try_to_load(self, version: int, path: Path) -> bool:
        files = _file_stats(path)
        failure = self._failures.get(version)
        num_tries = 0
        if failure is not None and failure.files == files:
            num_tries = failure.num_tries
            due_s = failure.time_s + self._settings.retry_interval_s
            if num_tries > self._settings.max_num_retries or time.monotonic() < due_s:
                return False
        if self._load(version, path, is_last_try=num_tries == self._settings.max_num_retries):
            self._failures.pop(version, None)
            return True
        self._failures[version] = _Failure(files, num_tries + 1, time.monotonic())
        _free_memory()
        return False

    def _load(self, version: int, path: Path, *, is_last_try: bool) -> bool:
        logger.info("loading model=%s version=%d path=%s", self.name, version, path)
        started = time.monotonic()
        self._set_status(version, VersionStatus(State.LOADING))
        try:
            servable = Servable(self.name, version, path)
            num_warmups = replay_warmup_requests(servable, self._settings.num_warmup_iterations)
        except Exception as error:  # whatever a damaged folder raises, the versions that serve must go on
            code = _code_of(error)
            metrics.record_load(path, code, time.monotonic() - started)
            state = State.END if is_last_try else State.LOADING
            self._set_status(version, VersionStatus(state, code, str(error)))
            logger.exception(
                "model=%s version=%d cannot be loaded, still serving=%s, next try %s; repair or remove %s",
                self.name, version, self.versions() or "nothing",
                "when its files change" if is_last_try else f"in {self._settings.retry_interval_s:g} s", path,
            )  # fmt: skip
            return False
        self._loaded = {**self._loaded, version: servable}
        self._set_status(version, VersionStatus(State.AVAILABLE))
        metrics.record_load(path, grpc.StatusCode.OK, time.monotonic() - started)
        logger.info(
            "serving model=%s version=%d warmup_requests=%d load_time=%.2f s",
            self.name, version, num_warmups, time.monotonic() - started,
        )  # fmt: skip
        return True

    def _set_status(self, version: int, status: VersionStatus) -> None:
        with self._status_lock:
            self._statuses[version] = status

    def _forget(self, known: set[int]) -> None:
        """Without this a server that gets a version a minute would remember every one that it ever had."""
        with self._status_lock:
            self._statuses = {v: status for v, status in self._statuses.items() if v in known}
        self._failures = {v: failure for v, failure in self._failures.items() if v in known}


def _free_memory() -> None:
    """Frees what models leave behind that were unloaded, or that did not load.

    Their graphs are cycles of Python objects, so few that the collector would not come for hours, and each
    holds megabytes of the C++ side: 40 MB a version at 200,000 x 128. It takes milliseconds, since the server
    has frozen what was imported. The C library would keep as much again.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _code_of(error: Exception) -> grpc.StatusCode:
    if isinstance(error, RequestError):
        return error.code
    if isinstance(error, tf.errors.OpError):
        return code_from_number(error.error_code)
    return grpc.StatusCode.UNKNOWN


def _file_stats(path: Path) -> _FileStats:
    """Name, size and time of every file below: changes when a half-copied or damaged version is completed."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file, file.stat()) for file in files]
    return tuple((str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns) for file, stat in stats)
