"""What a finished run left behind; other commands start from it. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from schema.errors import DataError
from tfx_pipeline.config import RunConfig, RunPaths


@dataclasses.dataclass(frozen=True)
class ComponentTiming:
    """What one component took.

    Attributes:
      component: its id.
      wall_s: elapsed time.
      cpu_s: processor time of this process and its children.
      peak_memory_bytes: largest resident memory of this process and its children while it ran.
      cached: whether its outputs were reused.
    """

    component: str
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int
    cached: bool


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a finished run left; saved as run.json in the output directory.

    Attributes:
      dataset: its name.
      config_json: the resolved RunConfig.
      tables_dir: contract tables of the run.
      user_states: file pattern of the user-state examples.
      blessed: per model, whether it met every gate.
      pushed: per model, the pushed version, or None when it was not pushed.
      reasons: per model that was not pushed, why, in one line.
      report: path of the report.
      timings: what each component took.
    """

    dataset: str
    config_json: str
    tables_dir: str
    user_states: str
    blessed: dict[str, bool]
    pushed: dict[str, str | None]
    reasons: dict[str, str]
    report: str
    timings: tuple[ComponentTiming, ...]

    @property
    def config(self) -> RunConfig:
        """The configuration of the run."""
        return RunConfig.model_validate_json(self.config_json)


def read_run(output_dir: Path) -> RunResult:
    """Reads run.json.

    Raises:
      DataError: no run finished in the directory, or run.json is of another version of Funnel.
    """
    path = RunPaths(output_dir).run_file
    if not path.is_file():
        raise DataError(f"no finished run in {output_dir}; run 'funnel run --output-dir {output_dir}' first")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        timings = tuple(ComponentTiming(**timing) for timing in values.pop("timings"))
        result = RunResult(**values, timings=timings)
        RunConfig.model_validate_json(result.config_json)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read by this version of Funnel; 'funnel run' with the same settings renews it"
        ) from error
    return result


def write_run(result: RunResult, output_dir: Path) -> None:
    """Writes run.json, whole or not at all."""
    path = RunPaths(output_dir).run_file
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(result), indent=1), encoding="utf-8")
    partial.replace(path)
