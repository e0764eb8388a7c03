"""The `funnel` command. Exit codes: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from schema.errors import ConfigError, FunnelError
from tfx_pipeline.config import (
    BUILT_IN_CONFIGS,
    DEFAULT_OUTPUT_DIR,
    MODELS,
    RunConfig,
    RunPaths,
    load_run_config,
)
from trainer.version import __version__

# A pipe or a file has no width of its own; tables need about this much.
_CONSOLE = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
_GRPC_PORT = 8500
_REST_PORT = 8501
_ITEMS_NAMED = 5
_BUILT_IN = sorted(p.stem for p in BUILT_IN_CONFIGS.glob("*.yaml"))
_DEFAULT_CACHE_DIR = Path.home() / ".cache" / "funnel"


class _Group(click.Group):
    """Turns errors into one readable message and the documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            _fail(str(error), code=2)
        except FunnelError as error:
            _fail(str(error), code=1)
        except KeyboardInterrupt:
            _fail("interrupted", code=1)
        except PermissionError as error:
            _fail(f"no permission: {error}", code=1)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _fail(f"the disk is full: {error}; free some space", code=1)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/bold red] {escape(message)}"
    )
    sys.exit(code)


def _say(text: str) -> None:
    # Long lines are left to the terminal, so that paths and commands in them can be copied.
    _CONSOLE.print(text, soft_wrap=True)


def _output_dir(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--output-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=DEFAULT_OUTPUT_DIR,
        show_default=True,
        help="Folder of the run: tables, artifacts, metadata, pushed models, report.",
    )(command)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="funnel")
def main() -> None:
    """Train, judge, push and serve a two-stage recommender.

    \b
    First steps:
      funnel doctor
      funnel run --dataset simulated
      funnel serve
      funnel recommend --user-id u00017
    """


@main.command()
@click.option("--dataset", type=click.Choice(_BUILT_IN), help="A built-in dataset.")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A run YAML of your own; see docs/own-data.md.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder (or archive) of the source files; replaces a download.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; may be repeated."
)
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=_DEFAULT_CACHE_DIR,
    show_default=True,
    help="Where downloaded and unpacked archives are kept between runs.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and the graph; run nothing.")
@_output_dir
def run(
    dataset: str | None,
    config: Path | None,
    data_dir: Path | None,
    overrides: tuple[str, ...],
    cache_dir: Path,
    dry_run: bool,
    output_dir: Path,
) -> None:
    """Run the pipeline: data in, blessed models and a report out.

    \b
    Examples:
      funnel run --dataset simulated
      funnel run --dataset kuairand-pure --data-dir ~/data --output-dir runs/kuairand
      funnel run --config my.yaml --set retrieval.max_epochs=5
    """
    if (dataset is None) == (config is None):
        raise click.UsageError(f"give one of --dataset ({', '.join(_BUILT_IN)}) and --config FILE")
    run_config = load_run_config(config or str(dataset), overrides)
    if dry_run:
        _print_plan(run_config, RunPaths(output_dir))
        return
    _run(run_config, RunPaths(output_dir), data_dir, cache_dir)


def _run(run_config: RunConfig, paths: RunPaths, data_dir: Path | None, cache_dir: Path) -> None:
    from tfx_pipeline.console import ComponentProgress, quiet_libraries
    from tfx_pipeline.local_runner import prepare, run_lock, run_pipeline

    started = time.monotonic()
    with run_lock(paths), _failures_explained(paths):
        paths.log_file.unlink(missing_ok=True)
        quiet_libraries(paths.log_file)
        _say(
            f"[bold]{escape(run_config.dataset.name)}[/bold] → {escape(str(paths.output_dir))}  "
            f"(log: {escape(str(paths.log_file))})"
        )
        with _CONSOLE.status("checking the source data …"):
            tables_dir = prepare(run_config, paths, data_dir, cache_dir)
        _print_summary(tables_dir)
        progress = ComponentProgress(_CONSOLE)
        with _CONSOLE.status("loading TFX …"):
            import tfx_pipeline.pipeline  # noqa: F401
        quiet_libraries(paths.log_file)
        try:
            result = run_pipeline(run_config, paths, tables_dir, progress.started, progress.finished)
        finally:
            progress.stop()
    reused = sum(timing.cached for timing in result.timings)
    _say(
        f"done in {time.monotonic() - started:.0f} s, "
        f"{reused} of {len(result.timings)} components reused from cache"
    )
    _print_decision(result)


@contextlib.contextmanager
def _failures_explained(paths: RunPaths) -> Iterator[None]:
    """Writes what ends a run to its log, and says where to look and what the next run does."""
    try:
        yield
    except KeyboardInterrupt:
        raise FunnelError(
            "interrupted; nothing half-written was pushed, and the next run reuses what was finished"
        ) from None
    except Exception as error:
        # Through the root logger, which writes to the file only: the person gets a few words.
        logging.getLogger().error("the run failed", exc_info=error)
        if _disk_is_full(error):
            raise FunnelError(
                f"the disk is full: {error}; free some space, the next run reuses what was finished"
            ) from error
        if isinstance(error, FunnelError) and error.__cause__ is None:
            raise
        text = str(error) if isinstance(error, FunnelError) else f"{type(error).__name__}: {error}"
        raise FunnelError(f"{text}\nmore about it: {paths.log_file}") from error


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        # TensorFlow and Arrow have errors of their own with the system's text.
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _print_summary(tables_dir: Path) -> None:
    from schema.tables import read_summary

    summary = read_summary(tables_dir)
    rows = ", ".join(f"{split} {count:,}" for split, count in summary.rows.items())
    _CONSOLE.print(f"  interactions: {rows};  users {summary.users:,}, items {summary.items:,}")


def _print_decision(result: Any) -> None:
    for model in MODELS:
        version = result.pushed[model]
        if version:
            _CONSOLE.print(f"  [green]blessed and pushed[/green]: {model} version {version}")
        else:
            reason = result.reasons.get(model, "see the report")
            _say(f"  [yellow]not pushed[/yellow]: {model}: {escape(reason)}")
    _say(f"  report: {escape(result.report)}")


def _print_plan(run_config: RunConfig, paths: RunPaths) -> None:
    import yaml

    from tfx_pipeline.console import quiet_libraries

    quiet_libraries(None)
    from tfx_pipeline.pipeline import PipelineLocations, create_pipeline

    placeholder = PipelineLocations(
        "<tables>",
        0,
        str(paths.pipeline_root),
        str(paths.serving_models),
        str(paths.report),
        code_version=__version__,
        released=dict.fromkeys(MODELS, ""),
    )
    pipeline = create_pipeline(run_config, placeholder)
    _CONSOLE.print(
        yaml.safe_dump(run_config.model_dump(mode="json"), sort_keys=False), markup=False, soft_wrap=True
    )
    for node in pipeline.components:
        upstream = ", ".join(sorted(n.id for n in node.upstream_nodes)) or "source tables"
        _CONSOLE.print(f"{node.id:<22} ← {upstream}", markup=False, soft_wrap=True)


@main.command()
@click.option("--port", default=_GRPC_PORT, show_default=True, help="gRPC port.")
@click.option("--rest-api-port", default=_REST_PORT, show_default=True, help="REST port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@_output_dir
def serve(port: int, rest_api_port: int, host: str, output_dir: Path) -> None:
    """Serve the pushed models over TensorFlow Serving's gRPC and REST API until Ctrl-C.

    \b
    Examples:
      funnel serve
      funnel serve --output-dir runs/kuairand --port 9500 --rest-api-port 9501
    """
    from serving.config import format_model_config
    from serving.model_server import main as serve_models
    from tfx_pipeline.run_result import read_run

    paths = RunPaths(output_dir)
    result = read_run(output_dir)
    bases = {model: (paths.serving_models / model).resolve() for model in MODELS}
    for model, base in bases.items():
        if not any(folder.name.isdigit() for folder in base.glob("*")):
            raise FunnelError(
                f"no {model} model was ever pushed to {base}: {result.reasons.get(model, 'it is gone')}"
            )
    config_file = paths.serving_models / "models.config"
    config_file.write_text(format_model_config(bases), encoding="utf-8")
    sys.exit(
        serve_models(
            [
                f"--host={host}",
                f"--port={port}",
                f"--rest_api_port={rest_api_port}",
                f"--model_config_file={config_file}",
            ]
        )
    )


@main.command()
@click.option(
    "--user-id", required=True, help="Who to recommend to; a user nobody has seen gets a general answer."
)
@click.option("--k", type=click.IntRange(min=1), default=20, show_default=True, help="Items to show.")
@click.option(
    "--target",
    default=f"grpc://127.0.0.1:{_GRPC_PORT}",
    show_default=True,
    help="Server: grpc:// or http://.",
)
@click.option("--include-seen", is_flag=True, help="Do not exclude items of the user's training history.")
@_output_dir
def recommend(user_id: str, k: int, target: str, include_seen: bool, output_dir: Path) -> None:
    """Ask a running server for one user's recommendations.

    \b
    Examples:
      funnel recommend --user-id u00017
      funnel recommend --user-id u00017 --k 5 --target http://127.0.0.1:8501
    """
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.run_result import read_run

    quiet_libraries(None)
    _show_recommendations(read_run(output_dir), RunPaths(output_dir), user_id, k, target, include_seen)


def _show_recommendations(
    result: Any, paths: RunPaths, user_id: str, k: int, target: str, include_seen: bool
) -> None:
    from serving.client import RecommenderClient
    from tfx_pipeline.console import recommendations_table
    from tfx_pipeline.recommend import titles, user_state
    from trainer.score import formula

    state, in_data = user_state(result, user_id)
    with RecommenderClient(target, timeout_s=30.0) as client:
        answer = client.recommend(
            state.request,
            k=k,
            exclude_item_ids=() if include_seen else state.seen_item_ids,
            num_candidates=max(100, k),
        )
    tasks = [task.name for task in result.config.dataset.tasks]
    heading = f"user {user_id}, {answer.history_length} items of history, over {target.split(':')[0]}"
    _CONSOLE.print(recommendations_table(answer, titles(result, paths), tasks, heading))
    if not in_data:
        _say(f"  [yellow]user {escape(user_id)} is not in the data[/yellow]: recommended from context alone")
    elif not answer.user_is_known:
        _say(
            f"  [yellow]user {escape(user_id)} had no training events[/yellow]: "
            "recommended from features alone"
        )
    _CONSOLE.print(f"  {escape(formula(result.config.dataset.tasks))}")


@main.command("batch-recommend")
@click.option(
    "--users",
    required=True,
    type=click.Path(path_type=Path),
    help="Text file (an id per line), or CSV or Parquet with user_id.",
)
@click.option("--k", type=click.IntRange(min=1), default=100, show_default=True, help="Items per user.")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Parquet file to write."
)
@click.option("--include-seen", is_flag=True, help="Do not exclude items of the users' training history.")
@_output_dir
def batch_recommend(users: Path, k: int, out: Path, include_seen: bool, output_dir: Path) -> None:
    """Write the retrieval model's top-k for many users, as of the end of training.

    Columns: user_id, rank (from 1), item_id, score. Users unknown to the model are included; items of a
    user's training history are not, unless --include-seen.

    \b
    Example:
      funnel batch-recommend --users users.txt --k 100 --out recs.parquet
    """
    from rich.progress import Progress

    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.recommend import batch_recommend as write_batch
    from tfx_pipeline.recommend import read_user_ids
    from tfx_pipeline.run_result import read_run

    quiet_libraries(None)
    result = read_run(output_dir)
    user_ids = read_user_ids(users)
    started = time.monotonic()
    with Progress(console=_CONSOLE) as progress:
        task = progress.add_task("users", total=len(user_ids))
        unknown = write_batch(
            result,
            RunPaths(output_dir),
            user_ids,
            k,
            include_seen,
            out,
            lambda n: progress.update(task, completed=n),
        )
    _say(f"{len(user_ids):,} users × {k} → {escape(str(out))} in {time.monotonic() - started:.1f} s")
    if unknown:
        users_text = "user" if unknown == 1 else "users"
        _say(f"  [yellow]not in the data, so with general recommendations: {unknown:,} {users_text}[/yellow]")


@main.command("batch-score")
@click.option(
    "--interactions",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="CSV or Parquet of impressions, in the dataset's own source format; labels may be absent.",
)
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Parquet file to write."
)
@click.option(
    "--online-history",
    is_flag=True,
    help="A row also knows the rows of the file with an earlier time, labels included, as a live system "
    "would. Default: the train split alone.",
)
@click.option(
    "--model-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a ranking SavedModel. Default: the newest pushed one.",
)
@_output_dir
def batch_score(
    interactions: Path, out: Path, online_history: bool, model_dir: Path | None, output_dir: Path
) -> None:
    """Write the ranking model's predictions for every row of a file of impressions.

    One row out per row in, in the same order. Columns: user_id, item_id, event_time_unix_s, item_is_known,
    user_is_known, one per task, score, and label_<name> for each label that the file has.

    \b
    Examples:
      funnel batch-score --interactions impressions.csv --out preds.parquet
      funnel batch-score --interactions last_week.parquet --online-history --out preds.parquet
    """
    from rich.progress import Progress

    from schema.tables import read_interactions
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.run_result import read_run

    if out.resolve() == interactions.resolve():
        raise click.UsageError(f"--out {out} is the file that is read; give another name")
    quiet_libraries(None)
    result = read_run(output_dir)
    started = time.monotonic()
    rows = read_interactions(result.config.dataset, interactions)
    with _CONSOLE.status("loading TensorFlow …"):
        from tfx_pipeline.batch_score import batch_score as write_scores
    with Progress(console=_CONSOLE) as progress:
        task = progress.add_task("rows", total=len(rows.table))
        scored = write_scores(
            result,
            RunPaths(output_dir),
            rows,
            out,
            online_history,
            model_dir,
            lambda n: progress.update(task, completed=n),
        )
    _say(f"{scored.num_rows:,} rows → {escape(str(out))} in {time.monotonic() - started:.1f} s")
    known = "earlier rows of the file, and the train split" if online_history else "the train split"
    _say(f"  histories and counters: from {known}, which ends {_utc(scored.train_end_unix_s)}")
    if rows.absent:
        _say(f"  [yellow]not in the file, so missing[/yellow]: {', '.join(rows.absent)}")
    for what, count in (
        ("item not in the catalogue", scored.num_unknown_items),
        ("user without training events", scored.num_unknown_users),
    ):
        if count:
            _say(f"  [yellow]{what}[/yellow]: {count:,} {'row' if count == 1 else 'rows'}")


def _utc(time_unix_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_unix_s))


@main.command("refresh-index")
@click.option(
    "--items",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV or Parquet file of new and changed items, in the dataset's own format; may be repeated. "
    "All other items stay as they are.",
)
@click.option(
    "--data-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the dataset's source files, with its whole items table: items that are not in it are "
    "removed.",
)
@_output_dir
def refresh_index(items: tuple[Path, ...], data_dir: Path | None, output_dir: Path) -> None:
    """Bring newer items into the pushed models, without training.

    Publishes a new version of the retrieval model, with vectors of new and changed items and an index over
    all, and of the ranking model, which looks items up in a catalogue of its own. A running server takes both
    up by itself. Nothing is published when no item is new, changed or removed.

    \b
    Examples:
      funnel refresh-index --items new_items.csv
      funnel refresh-index --output-dir runs/my-shop --data-dir ~/data
    """
    if bool(items) == (data_dir is not None):
        raise click.UsageError("give one of --items FILE (new or changed items) and --data-dir DIR (all)")
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.local_runner import run_lock
    from tfx_pipeline.run_result import read_run

    started = time.monotonic()
    paths = RunPaths(output_dir)
    result = read_run(output_dir)
    files = items if data_dir is None else [data_dir / name for name in result.config.dataset.items.files]
    with run_lock(paths), _failures_explained(paths):
        quiet_libraries(paths.log_file)
        with _CONSOLE.status("loading TensorFlow …") as status:
            from tfx_pipeline.refresh import refresh_index as refresh

            quiet_libraries(paths.log_file)
            done = refresh(
                result, paths, files, data_dir is not None, lambda phase: status.update(f"{phase} …")
            )
    _print_refresh(done, time.monotonic() - started)


def _print_refresh(done: Any, total_s: float) -> None:
    change = done.change
    counts = {"added": change.added, "changed": change.changed, "removed": change.removed}
    for name, item_ids in counts.items():
        if item_ids:
            more = ", …" if len(item_ids) > _ITEMS_NAMED else ""
            _say(f"  {name}: {len(item_ids):,} ({escape(', '.join(item_ids[:_ITEMS_NAMED]))}{more})")
    _say(
        f"  catalogue: {done.num_items:,} items, {done.num_untrained:,} of them not met in training: "
        "their vectors come from their content"
    )
    if done.index is None:
        _say("nothing changed: no new version")
        return
    _say(f"  index: recall@{done.index.k} {done.index.recall:.4f} against exact search")
    for model in MODELS:
        _say(f"  [green]published[/green]: {model} version {done.version}")
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.seconds.items())
    _say(f"done in {total_s:.0f} s: {phases}")


@main.command()
@_output_dir
def report(output_dir: Path) -> None:
    """Say what the last run decided and where its report is.

    \b
    Example:
      funnel report --output-dir runs/kuairand
    """
    from tfx_pipeline.run_result import read_run

    result = read_run(output_dir)
    if not Path(result.report).is_file():
        raise FunnelError(
            f"{result.report} is gone; "
            f"'funnel run --output-dir {output_dir}' with the same settings restores it"
        )
    _CONSOLE.print(f"[bold]{result.dataset}[/bold]")
    _print_decision(result)


@main.command("score-weights")
@click.option(
    "--predictions",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Parquet of impressions: user_id, a column per task, labels; 'funnel batch-score' writes it.",
)
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    metavar="LABEL",
    help="A label to serve, such as click or watch_time_s; give at least two.",
)
@click.option(
    "--dataset",
    metavar="NAME|YAML",
    help="Where tasks and present weights are declared: a built-in dataset, or a run YAML. "
    "Default: the dataset of the run in --output-dir.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="TASK=W,...",
    help="Weights to compare with the present ones; tasks not named keep theirs. May be repeated.",
)
@click.option(
    "--list-by",
    default="user",
    show_default=True,
    metavar="user|user-day|COLUMN",
    help="What is ranked together: the impressions of a user, of a user's local day, or of a COLUMN's value.",
)
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Ranks of a list that count."
)
@click.option(
    "--points",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Weights to try beside those given, at most.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write every point here."
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw every point here (.svg or .png).",
)
@_output_dir
def score_weights(
    predictions: Path,
    objectives: tuple[str, ...],
    dataset: str | None,
    weights: tuple[str, ...],
    list_by: str,
    top: int,
    points: int,
    json_file: Path | None,
    plot_file: Path | None,
    output_dir: Path,
) -> None:
    """Show what other score weights would trade, on logged predictions, without training.

    Re-ranks every list of impressions by the score of each choice of weights and averages the labels by rank.
    It does not estimate what users would have done in front of the new order.

    \b
    Examples:
      funnel score-weights --predictions preds.parquet --objective click --objective watch_time_s
      funnel score-weights --predictions preds.parquet --objective click --objective like \\
          --weights like=4 --list-by user-day --plot trade-off.svg --output-dir runs/kuairand
    """
    from tfx_pipeline import score_weights as module
    from tfx_pipeline.run_result import read_run
    from trainer.score import formula, parse_weights

    if plot_file is not None:
        module.check_plot_suffix(plot_file)
    spec = (load_run_config(dataset) if dataset is not None else read_run(output_dir).config).dataset
    given = [(module.GIVEN, parse_weights(text, spec.tasks)) for text in weights]
    with _CONSOLE.status("re-ranking …"):
        impressions, found = module.read_impressions(predictions, spec, objectives, list_by)
        sampled = [(module.SAMPLED, w) for w in module.sample_weights(spec.tasks, impressions, points)]
        result = module.trade_off(impressions, found, spec.tasks, [*given, *sampled], top)
    _say(
        f"{result.num_impressions:,} impressions in {result.num_lists:,} lists by {escape(list_by)}; "
        f"{result.num_single:,} lists of one impression left out; the first {top} ranks count"
    )
    _say(f"  now: {escape(formula(spec.tasks))}")
    _CONSOLE.print(module.trade_off_table(result))
    present, *others = result.points
    _say(
        f"  the present weights are {'' if present.is_dominated else 'not '}dominated by others; "
        f"{sum(point.is_dominated for point in others):,} dominated points are not shown"
    )
    _say(f"  [yellow]{module.CAVEAT}[/yellow]")
    for path, write in ((json_file, module.write_json), (plot_file, module.write_plot)):
        if path is not None:
            write(result, path)
            _say(f"  → {escape(str(path))}")


@main.command()
@_output_dir
def doctor(output_dir: Path) -> None:
    """Check interpreter, libraries, processor, ports and disk, and say the fix for what is wrong.

    \b
    Example:
      funnel doctor
    """
    from tfx_pipeline.doctor import render, run_checks

    with _CONSOLE.status("checking; loading TensorFlow and ScaNN takes a while …"):
        checks = run_checks(output_dir, (_GRPC_PORT, _REST_PORT))
    _CONSOLE.print(render(checks))
    if any(check.status == "fail" for check in checks):
        sys.exit(1)


@main.command("compile")
@click.option("--target", type=click.Choice(["vertex"]), default="vertex", show_default=True)
@click.option("--dataset", type=click.Choice(_BUILT_IN), help="A built-in dataset.")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="A run YAML of your own.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; may be repeated."
)
@click.option("--tables-dir", required=True, help="Contract tables, for instance gs://bucket/tables.")
@click.option(
    "--train-end",
    required=True,
    type=int,
    help="End of training in unix seconds; train_end_unix_s of summary.json.",
)
@click.option(
    "--pipeline-root", required=True, help="Folder of the artifacts, for instance gs://bucket/root."
)
@click.option("--image", required=True, help="Container image with this repository installed.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("pipeline.json"), show_default=True
)
def compile_pipeline(
    target: str,
    dataset: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    tables_dir: str,
    train_end: int,
    pipeline_root: str,
    image: str,
    out: Path,
) -> None:
    """Compile the same pipeline for Vertex AI; needs the 'vertex' extra.

    \b
    Example:
      funnel compile --dataset simulated --tables-dir gs://b/tables --train-end 1700000000 \\
          --pipeline-root gs://b/root --image europe-docker.pkg.dev/p/r/funnel:0.1.0
    """
    if (dataset is None) == (config is None):
        raise click.UsageError(f"give one of --dataset ({', '.join(_BUILT_IN)}) and --config FILE")
    from tfx_pipeline.console import quiet_libraries

    run_config = load_run_config(config or str(dataset), overrides)
    quiet_libraries(None)
    from tfx_pipeline.vertex_compiler import compile_for_vertex

    compile_for_vertex(run_config, tables_dir, train_end, pipeline_root, image, out)
    _say(f"{target} pipeline → {escape(str(out))}")


@main.command()
@_output_dir
def demo(output_dir: Path) -> None:
    """The whole system on the simulated data: run, serve, recommend over gRPC and REST, stop.

    \b
    Example:
      funnel demo
    """
    paths = RunPaths(output_dir)
    _run(load_run_config("simulated"), paths, None, _DEFAULT_CACHE_DIR)

    from serving.process import ModelServerProcess
    from tfx_pipeline.recommend import serving_folder
    from tfx_pipeline.run_result import read_run
    from tfx_pipeline.user_states import read_user_states
    from trainer import features

    result = read_run(output_dir)
    for model in MODELS:
        serving_folder(result, paths, model)
    states = itertools.islice(read_user_states([result.user_states], result.config.dataset), 1_000)
    user_id = max(states, key=lambda state: len(state.query.get(features.HISTORY, ()))).user_id
    _CONSOLE.print("starting the model server …")
    with ModelServerProcess({model: paths.serving_models / model for model in MODELS}) as server:
        _CONSOLE.print(f"model server: {server.grpc_target}  {server.rest_target}")
        for address in (server.grpc_target, server.rest_target):
            _show_recommendations(result, paths, user_id, 10, address, include_seen=False)
    _CONSOLE.print("model server stopped")
    _say(f"\nreport: [bold]{escape(result.report)}[/bold]")
    _say(
        "next: [bold].venv/bin/funnel serve[/bold], "
        f"then [bold].venv/bin/funnel recommend --user-id {escape(user_id)}[/bold]; "
        "your own data: docs/own-data.md"
    )


if __name__ == "__main__":
    main()
