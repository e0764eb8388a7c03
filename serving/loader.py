"""Which version of each model is loaded, when it is replaced, and what is known about each."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import tensorflow as tf
from tensorflow_serving.apis import get_model_status_pb2, model_pb2

from schema.errors import ServingError
from serving.servable import Servable
from serving.status import RequestError, code_from_number, invalid_argument, not_found
from serving.versions import find_versions
from serving.warmup import replay_warmup_requests

logger = logging.getLogger(__name__)

State = get_model_status_pb2.ModelVersionStatus.State

_Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class VersionStatus:
    """State of one version; `message` is empty unless loading it failed."""

    state: int
    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""


class Model:
    """The versions of one model. At any time the newest version that loads is served."""

    def __init__(self, name: str, base_path: Path) -> None:
        self.name = name
        self.base_path = base_path
        self._loaded: dict[int, Servable] = {}
        self._statuses: dict[int, VersionStatus] = {}
        self._failed: dict[int, _Fingerprint] = {}

    def refresh(self) -> None:
        """Serves the newest version on disk that loads; the version before serves until that one is ready.

        A version that fails is reported with its error and tried again once its files change. When no version
        is left on disk the loaded one stays.
        """
        for version, path in sorted(find_versions(self.base_path).items(), reverse=True):
            if version in self._loaded:
                return
            fingerprint = _fingerprint(path)
            if self._failed.get(version) != fingerprint and self._load(version, path, fingerprint):
                return

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
        available = ", ".join(map(str, loaded)) or "none"
        raise not_found(f"Servable not found: {wanted} of model {self.name}; loaded: {available}")

    def statuses(self) -> dict[int, VersionStatus]:
        """Returns the state of each version seen since the start, newest first."""
        return dict(sorted(self._statuses.items(), reverse=True))

    def _load(self, version: int, path: Path, fingerprint: _Fingerprint) -> bool:
        logger.info("loading model=%s version=%d path=%s", self.name, version, path)
        started = time.monotonic()
        self._statuses[version] = VersionStatus(State.LOADING)
        try:
            servable = Servable(self.name, version, path)
            num_warmups = replay_warmup_requests(servable)
        except Exception as error:  # whatever a damaged folder raises, the versions that serve must go on
            self._statuses[version] = VersionStatus(State.END, _code_of(error), str(error))
            self._failed[version] = fingerprint
            logger.exception(
                "model=%s version=%d cannot be loaded, still serving=%s; repair or remove %s",
                self.name, version, sorted(self._loaded) or "nothing", path,
            )  # fmt: skip
            return False
        replaced = self._loaded
        self._statuses[version] = VersionStatus(State.AVAILABLE)
        self._loaded = {version: servable}
        self._failed.pop(version, None)
        for old_version in replaced:
            self._statuses[old_version] = VersionStatus(State.END)
        logger.info(
            "serving model=%s version=%d warmup_requests=%d load_time=%.2f s replaced=%s",
            self.name, version, num_warmups, time.monotonic() - started, sorted(replaced) or "nothing",
        )  # fmt: skip
        return True


class ModelManager:
    """All models of a server, and the thread that looks for new versions.

    Args:
      base_paths: folder of version directories by model name.
    """

    def __init__(self, base_paths: Mapping[str, Path]) -> None:
        self._models = {name: Model(name, path) for name, path in base_paths.items()}
        self._closing = threading.Event()
        self._poller: threading.Thread | None = None

    def load(self) -> None:
        """Loads each model for the first time.

        Raises:
          ServingError: a model has no version that loads; the text holds the reason per version.
        """
        for model in self._models.values():
            model.refresh()
            if not any(status.state == State.AVAILABLE for status in model.statuses().values()):
                reasons = "; ".join(f"version {v}: {s.message}" for v, s in model.statuses().items())
                raise ServingError(
                    f"model {model.name!r}: no version under {model.base_path} can be loaded: "
                    f"{reasons or 'there is none'}"
                )

    def start_polling(self, wait_s: float) -> None:
        """Looks for new versions every `wait_s` seconds; never, when that is not positive."""
        if wait_s > 0:
            self._poller = threading.Thread(
                target=self._poll, args=(wait_s,), name="version-poller", daemon=True
            )
            self._poller.start()

    def close(self) -> None:
        """Stops looking for new versions."""
        self._closing.set()

    def servable(self, spec: model_pb2.ModelSpec) -> Servable:
        """Returns the version that a request's `model_spec` asks for.

        Raises:
          RequestError: INVALID_ARGUMENT for a spec without name or with a label, NOT_FOUND if not loaded.
        """
        if spec.HasField("version_label"):
            raise invalid_argument(
                f"Unrecognized servable version label: {spec.version_label}; ask by number"
            )
        version = spec.version.value if spec.HasField("version") else None
        return self._model(spec.name).servable(version)

    def statuses(self, spec: model_pb2.ModelSpec) -> dict[int, VersionStatus]:
        """Returns the state of the versions asked for, newest first.

        Raises:
          RequestError: INVALID_ARGUMENT for a spec without name, NOT_FOUND for an unknown model or version.
        """
        statuses = self._model(spec.name).statuses()
        if not spec.HasField("version"):
            return statuses
        version = spec.version.value
        if version not in statuses:
            raise not_found(f"Could not find version {version} of model {spec.name}")
        return {version: statuses[version]}

    def serving_versions(self) -> Iterable[tuple[str, int]]:
        """Returns (model name, version) of what answers a request without version."""
        return [(model.name, model.servable(None).version) for model in self._models.values()]

    def _model(self, name: str) -> Model:
        if not name:
            raise invalid_argument("model_spec has no model name")
        if name not in self._models:
            raise not_found(f"Servable not found: no model {name}; served: {', '.join(sorted(self._models))}")
        return self._models[name]

    def _poll(self, wait_s: float) -> None:
        while not self._closing.wait(wait_s):
            for model in self._models.values():
                try:
                    model.refresh()
                except OSError:  # a folder that is being replaced while it is read; the next look may succeed
                    logger.exception("cannot look for versions model=%s path=%s", model.name, model.base_path)


def _code_of(error: Exception) -> grpc.StatusCode:
    if isinstance(error, RequestError):
        return error.code
    if isinstance(error, tf.errors.OpError):
        return code_from_number(error.error_code)
    return grpc.StatusCode.UNKNOWN


def _fingerprint(path: Path) -> _Fingerprint:
    """Name, size and time of every file below: changes when a half-copied or damaged version is completed."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file, file.stat()) for file in files]
    return tuple((str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns) for file, stat in stats)
