"""Draws the facts of a run as one static page, and writes the same facts as JSON."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tfx_pipeline.config import MODELS
from tfx_pipeline.report import charts, plots, views
from tfx_pipeline.report.facts import METRICS_FILE, RunFacts
from tfx_pipeline.report.model_card import render_card
from tfx_pipeline.report.templating import render_template, write_files
from tfx_pipeline.report.verdicts import overall_sentence, reason_sentence, verdict
from trainer.comparison import LAST_BLESSED

PAGE = "index.html"
CARD = "model_card.md"


SECTIONS = (
    ("verdict", "Verdict"),
    ("changes", "What changed"),
    ("metrics", "Metrics"),
    ("slices", "Slices"),
    ("gates", "Gates"),
    ("calibration", "Calibration"),
    ("scores", "Scores"),
    ("training", "Training"),
    ("index", "Index"),
    ("load", "Load"),
    ("waterfall", "Waterfall"),
    ("off-policy", "Off-policy"),
    ("recommendations", "Recommendations"),
    ("data", "Data"),
    ("anomalies", "Anomalies"),
    ("leakage", "Leakage"),
    ("features", "Features"),
    ("cost", "Cost"),
    ("reproduce", "Reproduce"),
)


def write_report(facts: RunFacts, destination: Path) -> None:
    """Writes index.html, metrics.json and model_card.md; each appears complete, in place of an older one.

    Equal facts give equal bytes.

    Args:
      facts: what to show.
      destination: folder; made when absent.
    """
    write_files(report_files(facts), destination)


def report_files(facts: RunFacts, runs_link: str = "") -> dict[str, str]:
    """The texts of a report by the names of their files; `runs_link` as for `render_page`."""
    return {
        PAGE: render_page(facts, runs_link),
        METRICS_FILE: render_json(facts),
        CARD: render_card(facts),
    }


def render_page(facts: RunFacts, runs_link: str = "") -> str:
    """The whole page, which needs no other file and no network.

    Args:
      facts: what to show.
      runs_link: where the page over all runs lies; "" when there is none.
    """
    verdicts = [verdict(name, facts) for name in MODELS]
    config = yaml.safe_dump(dict(facts.config), sort_keys=False, allow_unicode=True) if facts.config else ""
    return render_template(
        "report.html.j2",
        facts,
        sections=SECTIONS,
        runs_link=runs_link,
        facts=facts,
        charts=charts,
        bars=plots.bars,
        verdicts=verdicts,
        overall_sentence=overall_sentence(verdicts),
        reason=reason_sentence(verdicts, facts),
        dataset=views.dataset_name(facts),
        config=config,
        config_link="data:application/yaml;base64," + base64.b64encode(config.encode()).decode(),
    )


def render_json(facts: RunFacts) -> str:
    """JSON with `metrics` by flat key, such as `ranking/click/auc`, and all `facts`.

    `metrics` holds those of the whole test split: `model`, `last_blessed`, and a mapping for each of the
    `baselines`. Undefined values are null.
    """
    models = facts.models.values()
    rivals: dict[str, dict[str, float | None]] = {}
    for model in models:
        for name in model.rivals:
            rivals.setdefault(name, {}).update(model.rival(name))
    metrics = {
        "model": {key: value for model in models for key, value in model.overall.items()},
        "last_blessed": rivals.pop(LAST_BLESSED, {}),
        "baselines": rivals,
    }
    values = _plain({"metrics": metrics, "facts": dataclasses.asdict(facts)})
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
