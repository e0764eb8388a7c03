"""`funnel recommend`, `funnel batch-recommend`: recommendations of the pushed models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from tfx_pipeline.commands.common import CONSOLE, GRPC_PORT, output_dir_option, say
from tfx_pipeline.config import (
    RunPaths,
)


@click.command()
@click.option(
    "--user-id", required=True, help="Who to recommend to; a user nobody has seen gets a general answer."
)
@click.option("--k", type=click.IntRange(min=1), default=20, show_default=True, help="Items to show.")
@click.option(
    "--target",
    default=f"grpc://127.0.0.1:{GRPC_PORT}",
    show_default=True,
    help="Server: grpc:// or http://.",
)
@click.option("--include-seen", is_flag=True, help="Do not exclude items of the user's training history.")
@click.option(
    "--weights", metavar="TASK=W,...", help="Score weights of this request; tasks not named keep theirs."
)
@output_dir_option
def recommend(
    user_id: str, k: int, target: str, include_seen: bool, weights: str | None, output_dir: Path
) -> None:
    """Ask a running server for one user's recommendations.

    \b
    Examples:
      funnel recommend --user-id u00017
      funnel recommend --user-id u00017 --k 5 --target http://127.0.0.1:8501
      funnel recommend --user-id u00017 --weights click=1,like=4
    """
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.run_result import read_run
    from trainer.score import parse_weights

    quiet_libraries(None)
    result = read_run(output_dir)
    chosen = None if weights is None else parse_weights(weights, result.config.dataset.tasks)
    show_recommendations(result, RunPaths(output_dir), user_id, k, target, include_seen, chosen)


def show_recommendations(
    result: Any,
    paths: RunPaths,
    user_id: str,
    k: int,
    target: str,
    include_seen: bool,
    score_weights: Mapping[str, float] | None = None,
) -> None:
    """Asks a server for one user\'s recommendations and prints them."""
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
            score_weights=score_weights,
        )
    tasks = [task.name for task in result.config.dataset.tasks]
    heading = f"user {user_id}, {answer.history_length} items of history, over {target.split(':')[0]}"
    CONSOLE.print(recommendations_table(answer, titles(result, paths), tasks, heading))
    if not in_data:
        say(f"  [yellow]user {escape(user_id)} is not in the data[/yellow]: recommended from context alone")
    elif not answer.user_is_known:
        say(
            f"  [yellow]user {escape(user_id)} had no training events[/yellow]: "
            "recommended from features alone"
        )
    CONSOLE.print(f"  {escape(formula(result.config.dataset.tasks, score_weights))}")


@click.command("batch-recommend")
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
@output_dir_option
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
    with Progress(console=CONSOLE) as progress:
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
    say(f"{len(user_ids):,} users × {k} → {escape(str(out))} in {time.monotonic() - started:.1f} s")
    if unknown:
        users_text = "user" if unknown == 1 else "users"
        say(f"  [yellow]not in the data, so with general recommendations: {unknown:,} {users_text}[/yellow]")
