"""The reports of all runs of an output directory: each in a folder of its own, the newest shown first."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from schema.errors import DataError
from tfx_pipeline.config import MODELS
from tfx_pipeline.report.differences import differences
from tfx_pipeline.report.facts import METRICS_FILE, RunFacts, read_facts
from tfx_pipeline.report.render import PAGE, report_files
from tfx_pipeline.report.runs_page import RUNS_PAGE, render_runs
from tfx_pipeline.report.templating import write_files
from tfx_pipeline.run_result import ComponentTiming


@dataclasses.dataclass(frozen=True)
class History:
    """The runs that left a report, oldest first, and what is wrong with folders that cannot be read."""

    runs: tuple[RunFacts, ...]
    unreadable: tuple[str, ...]


def publish(artifact: Path, report_dir: Path, timings: Sequence[ComponentTiming]) -> Path:
    """Puts the report of a run where people look for it, and renews the page over all runs.

    `report_dir` gets the newest run's page, `<run id>/` with the same of every run, and runs.html. A run
    that reused every component is one that is there already, and keeps what it cost when it ran.

    Args:
      artifact: what the ReportWriter wrote.
      report_dir: made when absent.
      timings: what the components of the run took.

    Returns:
      The newest run's page.
    """
    facts = read_facts(artifact / METRICS_FILE)
    earlier = [run for run in read_history(report_dir).runs if run.created_unix_s < facts.created_unix_s]
    try:
        facts = read_facts(report_dir / facts.run_id / METRICS_FILE)
    except DataError:
        blessed = [run for run in earlier if any(run.models[model].blessed for model in MODELS)]
        facts = dataclasses.replace(
            facts,
            timings=tuple(timings),
            machine=machine(),
            since=differences(blessed[-1], facts) if blessed else None,
        )
    _write(facts, report_dir)
    history = read_history(report_dir)
    write_files({RUNS_PAGE: render_runs(history.runs, history.unreadable)}, report_dir)
    return report_dir / PAGE


def add_to_newest(report_dir: Path, **measured: Any) -> Path:
    """Adds what was measured after a run to the report of the newest run, in place of what was there.

    Args:
      report_dir: of the output directory.
      measured: fields of RunFacts; of a mapping, the keys that are given.

    Returns:
      The newest run's page.

    Raises:
      DataError: there is no report, or it is of another version of Funnel.
    """
    facts = read_facts(report_dir / METRICS_FILE)
    missing = {piece: why for piece, why in facts.missing.items() if piece not in measured}
    merged: dict[str, Any] = {
        name: {**getattr(facts, name), **value} if isinstance(value, Mapping) else value
        for name, value in measured.items()
    }
    _write(dataclasses.replace(facts, missing=missing, **merged), report_dir)
    return report_dir / PAGE


def _write(facts: RunFacts, report_dir: Path) -> None:
    """Writes the report of the newest run where people look first, and to the folder of the run."""
    files = report_files(facts, runs_link=RUNS_PAGE)
    write_files(files, report_dir)
    page = files[PAGE].replace(f'href="{RUNS_PAGE}"', f'href="../{RUNS_PAGE}"')
    write_files({**files, PAGE: page}, report_dir / facts.run_id)


def read_history(report_dir: Path) -> History:
    """Reads what is below `report_dir`; a folder that cannot be read costs no other."""
    runs, unreadable = [], []
    for path in sorted(report_dir.glob(f"*/{METRICS_FILE}")):
        try:
            runs.append(read_facts(path))
        except DataError as error:
            unreadable.append(str(error))
    return History(tuple(sorted(runs, key=lambda run: run.created_unix_s)), tuple(unreadable))


def find_run(run: str, report_dir: Path) -> RunFacts:
    """Reads one run.

    Args:
      run: an output directory, the folder of a report, or the id of a run below `report_dir`.
      report_dir: reports of the output directory that ids belong to.

    Raises:
      DataError: there is no such run, or its report cannot be read.
    """
    folder = Path(run)
    for path in (folder / METRICS_FILE, folder / "report" / METRICS_FILE, report_dir / run / METRICS_FILE):
        if path.is_file():
            return read_facts(path)
    known = ", ".join(sorted(path.parent.name for path in report_dir.glob(f"*/{METRICS_FILE}"))) or "none"
    raise DataError(
        f"no report of a run {run!r}: give an output directory, the folder of a report, "
        f"or an id of a run in {report_dir}: {known}"
    )


def machine() -> dict[str, str]:
    """What a run ran on: the machine, for readers of the timings, and the commit of the sources."""
    return {
        "Processor": _processor(),
        "Cores": str(psutil.cpu_count() or "unknown"),
        "Memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "System": platform.platform(terse=True),
        "Commit": _commit(),
    }


def _commit() -> str:
    """The commit of the sources that ran, with `-dirty` when they were edited since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown: the sources are no git checkout"
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
