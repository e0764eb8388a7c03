"""The `funnel` command. Exit codes: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import errno
import sys
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from schema.errors import ConfigError, FunnelError
from tfx_pipeline.commands import (
    demo,
    evaluate,
    leakage,
    loadtest,
    off_policy,
    pipeline,
    placement,
    recommend,
    report,
    score,
    serve,
    waterfall,
)
from trainer.version import __version__


class _Group(click.Group):
    """Turns errors into one readable message and the documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params["traceback"]:
            return super().invoke(ctx)
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
        except FileNotFoundError as error:
            # Polars tells the file in its text only.
            what = f"there is no {error.filename}" if error.filename else str(error)
            _fail(
                f"{what}; what is gone of a run, 'funnel run' with the same settings makes again. If it was "
                f"never there, this is a bug: 'funnel --traceback {ctx.invoked_subcommand} …' shows where",
                code=1,
            )
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _fail(f"the disk is full: {error}; free some space", code=1)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/bold red] {escape(message)}"
    )
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="funnel")
@click.option("--traceback", is_flag=True, help="Show where an error comes from instead of one line.")
def main(traceback: bool) -> None:
    """Train, judge, push and serve a two-stage recommender.

    \b
    First steps:
      funnel doctor
      funnel run --dataset simulated
      funnel serve
      funnel recommend --user-id u00017
    """


for command in (
    pipeline.run,
    serve.serve,
    recommend.recommend,
    recommend.batch_recommend,
    score.batch_score,
    serve.refresh_index,
    placement.audit_placement,
    loadtest.loadtest,
    report.report,
    evaluate.evaluate,
    leakage.lint_leakage,
    waterfall.waterfall,
    score.score_weights,
    off_policy.off_policy,
    demo.doctor,
    pipeline.compile_pipeline,
    demo.demo,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
