"""Runs the pipeline on the taste world, as a person starts it, and reads what the run left."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REPO
from tfx_pipeline.config import MODELS, RunPaths
from tfx_pipeline.run_result import RunResult, read_run


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left, read at once: later runs share the folder."""

    exit_code: int
    output: str
    errors: str
    versions: dict[str, list[str]]
    result: RunResult
    metrics: dict[str, Any]
    page: str

    @property
    def reused(self) -> set[str]:
        return {timing.component for timing in self.result.timings if timing.cached}


def run(config: Path, paths: RunPaths, *args: str) -> Run:
    """Runs `funnel run` with further arguments."""
    command = [sys.executable, "-m", "tfx_pipeline.cli", "run", "--config", config]
    # As a person starts it: without what the tests set for TensorFlow in this process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "CUDA_"))}
    done = subprocess.run(
        [*command, "--output-dir", paths.output_dir, *args],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert paths.run_file.is_file(), done.stdout + done.stderr
    return Run(
        exit_code=done.returncode,
        output=done.stdout,
        errors=done.stderr,
        versions={
            model: sorted(os.listdir(paths.serving_models / model))
            for model in MODELS
            if (paths.serving_models / model).is_dir()
        },
        result=read_run(paths.output_dir),
        metrics=json.loads((paths.report / "metrics.json").read_text())["metrics"],
        page=(paths.report / "index.html").read_text(),
    )
