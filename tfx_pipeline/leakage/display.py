"""The linter's findings as people read them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from tfx_pipeline.leakage.findings import LeakageReport

_SHOWN_ASSOCIATIONS = 5


def tables(report: LeakageReport) -> Iterator[Table]:
    """Checks, the strongest features of each task, and what leaks would add."""
    table = Table(title=f"leakage: {report.dataset}", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("looked at")
    for check in report.checks:
        mark = "[green]ok[/green]" if check.passed else "[bold red]LEAK[/bold red]"
        table.add_row(check.name, mark, escape("\n  ".join([check.detail, *check.findings])))
    yield table

    table = Table(title="strongest single features", title_justify="left")
    table.add_column("task")
    table.add_column("feature")
    table.add_column("AUC", justify="right")
    for task in dict.fromkeys(a.task for a in report.associations):
        for found in [a for a in report.associations if a.task == task][:_SHOWN_ASSOCIATIONS]:
            value = f"{found.auc:.3f}"
            table.add_row(
                task, escape(found.feature), f"[bold red]{value}[/]" if found.auc > report.max_auc else value
            )
    yield table

    if report.inflation:
        honest = report.inflation[0].metrics
        table = Table(title="what cheap models would seem to be worth", title_justify="left")
        table.add_column("protocol")
        for name in honest:
            table.add_column(name, justify="right")
        for row in report.inflation:
            cells = [
                f"{value:.3f}" if row.is_honest else f"{value:.3f} ({value - honest[name]:+.3f})"
                for name, value in row.metrics.items()
            ]
            table.add_row(row.name, *cells, style="bold" if row.is_honest else "")
        yield table


def verdict(report: LeakageReport) -> str:
    """One line."""
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        return f"[bold red]leaks found[/bold red]: {', '.join(failed)}"
    return "[green]no leak found[/green]"
