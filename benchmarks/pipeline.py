"""Time and peak memory of every pipeline component, first and cached run.

Example:
  python benchmarks/pipeline.py --dataset movielens-1m --data-dir ~/data
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from schema.tables import read_summary
from tfx_pipeline.run_result import RunResult, read_run


def main() -> None:
    """Runs the pipeline twice in a fresh folder and prints what each component took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="simulated")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as 'funnel run --set'"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="funnel-benchmark-") as folder:
        output_dir = Path(folder)
        command = [sys.executable, "-m", "tfx_pipeline.cli", "run", "--dataset", options.dataset]
        command += ["--output-dir", folder, *(part for value in options.set for part in ("--set", value))]
        if options.data_dir is not None:
            command += ["--data-dir", str(options.data_dir)]
        figures = {}
        for name in ("first run", "cached run"):
            started = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            wall_s = time.monotonic() - started
            run = read_run(output_dir)
            _print(name, run, wall_s)
            figures[name] = {"wall_s": wall_s, **{t.component: t.wall_s for t in run.timings}}
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _print(name: str, run: RunResult, wall_s: float) -> None:
    rows = sum(read_summary(Path(run.tables_dir)).rows.values())
    print(f"\n{run.dataset}, {name}: {wall_s:.0f} s, {rows:,} interactions")
    print(f"{'component':<24}{'wall s':>9}{'CPU s':>9}{'peak GiB':>10}{'rows/CPU s':>12}")
    for timing in run.timings:
        if timing.cached:
            print(f"{timing.component:<24}{'reused':>9}")
            continue
        rate = f"{rows / timing.cpu_s:,.0f}" if timing.cpu_s > 0.05 else ""
        memory = timing.peak_memory_bytes / 1024**3
        print(f"{timing.component:<24}{timing.wall_s:>9.1f}{timing.cpu_s:>9.1f}{memory:>10.2f}{rate:>12}")


if __name__ == "__main__":
    main()
