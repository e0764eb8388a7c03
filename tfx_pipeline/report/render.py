"""Draws the facts of a run as one static page, and writes the same facts as JSON."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tfx_pipeline.config import MODELS
from tfx_pipeline.report import charts, formatting, plots, views
from tfx_pipeline.report.facts import RunFacts
from tfx_pipeline.report.verdicts import overall_sentence, verdict

PAGE = "index.html"
METRICS = "metrics.json"
_TEMPLATE = "report.html.j2"


def write_report(facts: RunFacts, destination: Path) -> None:
    """Writes index.html and metrics.json; each appears complete, in place of an older one.

    Equal facts give equal bytes.

    Args:
      facts: what to show.
      destination: folder; made when absent.
    """
    files = {PAGE: render_page(facts), METRICS: render_json(facts)}
    destination.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".report-", dir=destination.parent))
    try:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name in files:
            os.replace(temporary / name, destination / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def render_page(facts: RunFacts) -> str:
    """The whole page: no script, no file and no network address beside it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formatting.number,
        "share": formatting.share,
        "words": formatting.words,
        "moment": lambda unix_s: formatting.moment(unix_s, views.utc_offset_hours(facts)),
    }
    verdicts = [verdict(name, facts) for name in MODELS]
    config = yaml.safe_dump(dict(facts.config), sort_keys=False, allow_unicode=True) if facts.config else ""
    return environment.get_template(_TEMPLATE).render(
        facts=facts,
        views=views,
        charts=charts,
        bars=plots.bars,
        models=MODELS,
        verdicts=verdicts,
        overall_sentence=overall_sentence(verdicts),
        dataset=views.dataset_name(facts),
        config=config,
        config_link="data:application/yaml;base64," + base64.b64encode(config.encode()).decode(),
    )


def render_json(facts: RunFacts) -> str:
    """JSON with `metrics` by flat key, such as `ranking/click/auc`, and all `facts`.

    `metrics` holds those of the whole test split: `model`, `last_blessed`, and a mapping for each of the
    `baselines`. Undefined values are null.
    """
    baselines: dict[str, dict[str, float | None]] = {}
    for model in facts.models.values():
        for name, values in model.baselines.items():
            baselines.setdefault(name, {}).update(values)
    models = facts.models.values()
    metrics = {
        "model": {key: value for model in models for key, value in model.overall.items()},
        "last_blessed": {key: value for model in models for key, value in model.overall_last_blessed.items()},
        "baselines": baselines,
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
