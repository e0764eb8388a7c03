"""What the linter found: checks with their verdicts, and the tables shown beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.facts_file import read_facts

LEAKAGE_FILE = "leakage.json"


@dataclasses.dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
      name: short, in words.
      passed: whether no leak was found.
      detail: what was looked at, with counts.
      findings: what is wrong, one line each; the first few stand for all, see `failed`.
    """

    name: str
    passed: bool
    detail: str
    findings: tuple[str, ...] = ()


# Lines of findings that a check shows; the detail has the count.
MAX_FINDINGS = 5


def judged(name: str, detail: str, findings: Sequence[str]) -> Check:
    """A check that passes where there is no finding."""
    shown = tuple(findings[:MAX_FINDINGS])
    if len(findings) > len(shown):
        shown = (*shown, f"... and {len(findings) - len(shown):,} more")
    return Check(name, not findings, detail, shown)


@dataclasses.dataclass(frozen=True)
class Association:
    """How well one feature alone orders the labels of the eval split.

    Attributes:
      task: whose label.
      feature: its name.
      auc: of the feature's target encoding, fitted on train; XAUC where the label is not binary.
      num_rows: eval rows with a label.
    """

    task: str
    feature: str
    auc: float
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a cheap model seems to be worth under one way to split and to build features.

    Attributes:
      name: the protocol.
      is_honest: whether it asks what serving asks.
      metrics: metric key of model and metric, for instance `lightgbm/auc`, to its value.
    """

    name: str
    is_honest: bool
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class LeakageReport:
    """All that one call found; `leakage.json` holds the same.

    Attributes:
      dataset: its name.
      checks: in the order they were made.
      associations: the strongest features, best first.
      max_auc: above it a feature alone is taken for a leak.
      inflation: one row per protocol, the honest one first; empty when it was not asked for.
    """

    dataset: str
    checks: tuple[Check, ...]
    associations: tuple[Association, ...]
    max_auc: float
    inflation: tuple[Protocol, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def write_report(report: LeakageReport, path: Path) -> None:
    """Writes the report as JSON, with `passed` beside the fields."""
    values = {"passed": report.passed, **dataclasses.asdict(report)}
    path.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")


def read_report(path: Path) -> LeakageReport:
    """The inverse of `write_report`.

    Raises:
      DataError: no such file, or one of another version of Funnel.
    """
    return read_facts(LeakageReport, path)
