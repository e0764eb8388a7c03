"""The local model server as a subprocess: for infra validation, the demo command and tests."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from schema.errors import ServingError
from serving.config import format_model_config

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.05
_STOP_TIMEOUT_S: Final = 30.0
_NUM_LOG_LINES: Final = 20


class ModelServerProcess:
    """Runs the local model server in a fresh process; a context manager.

        with ModelServerProcess({"retrieval": Path("serving_models/retrieval")}) as server:
            client = RecommenderClient(server.grpc_target)

    Args:
      models: base path (the folder of the version directories) by model name, or a `models.config` file.
      grpc_port: 0 picks a free port.
      rest_port: 0 picks a free port.
      poll_wait_s: pause between looks for new versions; 0 never looks.
      flags: further flags of the server, such as `--max_num_load_retries=0`.
      startup_timeout_s: time for importing TensorFlow, loading and warming up all models.

    Raises:
      ServingError: on entering, when the server does not get ready; the text ends with its last log lines.
    """

    def __init__(
        self,
        models: Mapping[str, Path] | Path,
        *,
        grpc_port: int = 0,
        rest_port: int = 0,
        poll_wait_s: float = 0.0,
        flags: Sequence[str] = (),
        startup_timeout_s: float = 180.0,
    ) -> None:
        self._models = models
        self._flags = [
            f"--port={grpc_port or 'auto'}",
            f"--rest_api_port={rest_port or 'auto'}",
            f"--file_system_poll_wait_seconds={poll_wait_s}",
            *flags,
        ]
        self._startup_timeout_s = startup_timeout_s
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: dict[str, str] = {}

    @property
    def grpc_target(self) -> str:
        """Target for `RecommenderClient`, such as `grpc://127.0.0.1:8500`."""
        return f"grpc://{self._ready['grpc']}"

    @property
    def rest_target(self) -> str:
        """Target for `RecommenderClient`, such as `http://127.0.0.1:8501`."""
        return f"http://{self._ready['rest']}"

    @property
    def versions(self) -> dict[str, int]:
        """Version of each model that was loaded at the start."""
        pairs = (entry.rpartition(":") for entry in self._ready["models"].split(","))
        return {name: int(version) for name, _, version in pairs}

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        return self._read("stderr")

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise ServingError("the model server is not running; use it inside a with statement")
        return self._process.pid

    def __enter__(self) -> ModelServerProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="funnel-model-server-")
        folder = Path(self._folder.name)
        config_file = self._models
        if not isinstance(config_file, Path):
            models, config_file = config_file, folder / "models.config"
            config_file.write_text(format_model_config(models), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "serving.model_server",
            f"--model_config_file={config_file}",
            *self._flags,
        ]
        try:
            # Files, not pipes: a pipe that nobody empties would stop the server in the middle of a log line.
            with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
                self._process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=_environment())
            self._ready = self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits until the server ends; returns its exit code. Raises subprocess.TimeoutExpired."""
        if self._process is None:
            raise ServingError("the model server is not running; use it inside a with statement")
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """Stops the server: requests in flight are answered first; after 30 s it is killed."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.error(
                    "model server pid=%d did not stop within %.0f s: killed", self.pid, _STOP_TIMEOUT_S
                )
                self._process.kill()
                self._process.wait()
        self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> dict[str, str]:
        # Looks are counted, not seconds: time in which both processes were stopped is nobody's fault.
        for _ in range(math.ceil(self._startup_timeout_s / _POLL_S)):
            exit_code = process.poll()
            for line in self._read("stdout").splitlines(keepends=True):
                if line.startswith("ready ") and line.endswith("\n"):
                    return dict(part.split("=", 1) for part in line.split()[1:])
            if exit_code is not None:
                raise ServingError(
                    f"the model server ended with exit code {exit_code} before it was ready:\n{self._tail()}"
                )
            time.sleep(_POLL_S)
        timeout_s = self._startup_timeout_s
        raise ServingError(f"the model server was not ready after {timeout_s:g} s; log:\n{self._tail()}")

    def _read(self, name: str) -> str:
        if self._folder is None:
            raise ServingError("the model server is not running; use it inside a with statement")
        return (Path(self._folder.name) / name).read_text(encoding="utf-8", errors="replace")

    def _tail(self) -> str:
        return "\n".join(self.log.splitlines()[-_NUM_LOG_LINES:])


def _environment() -> dict[str, str]:
    source_root = str(Path(__file__).resolve().parent.parent)
    paths = [source_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TF_USE_LEGACY_KERAS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
