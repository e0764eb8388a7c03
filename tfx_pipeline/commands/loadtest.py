"""`funnel loadtest`: how a model server holds up at given rates."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.markup import escape
from rich.table import Table

from schema.errors import FunnelError
from tfx_pipeline.commands.common import CONSOLE, GRPC_PORT, add_to_report, output_dir_option, say
from tfx_pipeline.config import RunPaths

if TYPE_CHECKING:
    from serving.loadtest import LoadRequest, LoadResult, Sample

_DEFAULT_RATE_PER_S: Final = 50.0
_DEFAULT_DURATION_S: Final = 20.0
_MAX_USERS: Final = 1_000


@click.command()
@click.option(
    "--target",
    default=f"grpc://127.0.0.1:{GRPC_PORT}",
    show_default=True,
    help="Server: grpc:// or http://.",
)
@click.option(
    "--rate",
    "rates",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="Requests per second, in the mean of Poisson arrivals; may be repeated.  "
    f"[default: {_DEFAULT_RATE_PER_S:g}]",
)
@click.option(
    "--duration-s",
    type=click.FloatRange(min=0, min_open=True),
    help=f"Seconds at each rate.  [default: {_DEFAULT_DURATION_S:g}]",
)
@click.option(
    "--users",
    type=click.Path(path_type=Path),
    help="Text file (an id per line), or CSV or Parquet with user_id.  "
    f"[default: the first {_MAX_USERS:,} users of the run]",
)
@click.option("--k", type=click.IntRange(min=1), default=20, show_default=True, help="Items per answer.")
@click.option(
    "--num-candidates",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Items to retrieve and rank.",
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "one-call", "two-calls"]),
    default="auto",
    show_default=True,
    help="Ask the model that does all, or retrieval and ranking; auto takes what is served, one call first.",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Deadline of a request, from when it leaves.",
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Requests open at once; further ones wait, and the wait counts.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Draws arrivals and users.")
@click.option(
    "--slo",
    "slo_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML with rate_per_s, duration_s, p99_ms and error_budget; exit code 1 when it is missed.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for loadtest.json and loadtest.png.  [default: <output-dir>/loadtest]",
)
@output_dir_option
def loadtest(
    target: str,
    rates: tuple[float, ...],
    duration_s: float | None,
    users: Path | None,
    k: int,
    num_candidates: int,
    layout: str,
    timeout_s: float,
    max_in_flight: int,
    seed: int,
    slo_file: Path | None,
    out: Path | None,
    output_dir: Path,
) -> None:
    """Ask a running server for recommendations at given rates, and say how long answers took.

    Requests leave at their own times, whether or not earlier ones are answered, and latency counts from the
    scheduled time. Users and their histories are those of the run, as of the end of training.

    \b
    Examples:
      funnel loadtest --rate 50 --rate 100 --rate 200 --duration-s 20
      funnel loadtest --target http://127.0.0.1:8501 --slo serving/slo.yaml
    """
    if slo_file is not None and (rates or duration_s is not None):
        raise click.UsageError("--slo brings rate and duration; give no --rate and no --duration-s")
    if k > num_candidates:
        raise click.UsageError("--k is above --num-candidates")
    from serving.client import LAYOUTS, OneCall, TwoCalls
    from serving.loadtest import asking, measure, slo_misses
    from serving.loadtest_plot import plot_load
    from serving.slo import load_slo
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.report.collect import read_load_test

    quiet_libraries(None)
    slo = None if slo_file is None else load_slo(slo_file)
    if slo is not None:
        rates, duration_s = (slo.rate_per_s,), slo.duration_s
    rates, duration_s = tuple(sorted(rates)) or (_DEFAULT_RATE_PER_S,), duration_s or _DEFAULT_DURATION_S
    kinds = {"auto": (OneCall, TwoCalls), "one-call": (OneCall,), "two-calls": (TwoCalls,)}[layout]
    layouts = [each for each in LAYOUTS if isinstance(each, kinds)]
    requests = _requests(output_dir, users)
    measured: list[tuple[LoadResult, Sequence[Sample]]] = []
    with asking(
        target,
        requests,
        k=k,
        num_candidates=num_candidates,
        timeout_s=timeout_s,
        layouts=layouts,
        seed=seed,
    ) as ask:
        for rate in rates:
            with CONSOLE.status(f"{rate:g} requests/s for {duration_s:g} s …"):
                measured.append(measure(ask, rate, duration_s, seed, max_in_flight))
            _print_result(measured[-1][0])
    folder = out or RunPaths(output_dir).output_dir / "loadtest"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "target": target,
        "layout": layout,
        "num_users": len(requests),
        "k": k,
        "num_candidates": num_candidates,
        "timeout_s": timeout_s,
        "max_in_flight": max_in_flight,
        "seed": seed,
        "slo": None if slo is None else slo.model_dump(),
    }
    results = {"settings": settings, "results": [result.as_json() for result, _ in measured]}
    (folder / "loadtest.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot_load(measured, f"{target}, k={k}, {len(requests):,} users", folder / "loadtest.png")
    say(f"  {escape(str(folder / 'loadtest.json'))}, {escape(str(folder / 'loadtest.png'))}")
    add_to_report(RunPaths(output_dir).report, load_test=read_load_test(folder / "loadtest.json"))
    if slo is not None:
        misses = slo_misses(slo, measured[0][0])
        if misses:
            raise FunnelError(f"the objective of {slo_file} is missed: {'; '.join(misses)}")
        say(f"  [green]the objective of {escape(str(slo_file))} is met[/green]")


def _requests(output_dir: Path, users: Path | None) -> list[LoadRequest]:
    from serving.loadtest import LoadRequest
    from tfx_pipeline.recommend import read_user_ids, user_states
    from tfx_pipeline.run_result import read_run
    from tfx_pipeline.user_states import read_user_states

    run = read_run(output_dir)
    if users is None:
        states = list(itertools.islice(read_user_states([run.user_states], run.config.dataset), _MAX_USERS))
    else:
        states = [state for state, _ in user_states(run, read_user_ids(users))]
    return [LoadRequest(state.request, state.seen_item_ids) for state in states]


def _print_result(result: LoadResult) -> None:
    say(
        f"{result.rate_per_s:g} requests/s for {result.duration_s:g} s: {result.num_requests:,} sent, "
        f"{result.achieved_rate_per_s:.1f} answered per s, {result.error_share:.2%} failed"
    )
    table = Table()
    for heading in ("stage", "p50 ms", "p95 ms", "p99 ms", "max ms"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, latency in result.latency_ms.items():
        values: list[Any] = [latency.p50, latency.p95, latency.p99, latency.max]
        table.add_row(stage, *(f"{value:.1f}" for value in values))
    CONSOLE.print(table)
    for kind, count in sorted(result.errors.items()):
        say(f"  [red]{kind}[/red]: {count:,}")
    say(
        f"  load generator: {result.generator_cpu_ms_per_request:.2f} ms CPU per request, "
        f"{result.generator_cores:.2f} cores; requests left {result.late_ms.p99:.1f} ms late at p99"
    )
    for warning in result.warnings:
        say(f"  [yellow]{escape(warning)}[/yellow]")
