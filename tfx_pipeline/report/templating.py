"""Templates to text, and texts to files that appear whole."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tfx_pipeline.config import MODELS
from tfx_pipeline.report import formatting, views
from tfx_pipeline.report.facts import RunFacts

_FOLDER = Path(__file__).parent


def render_template(template: str, local: RunFacts | None, **values: Any) -> str:
    """A page from its template.

    Args:
      template: file beside this module.
      local: the run whose users' time zone is the page's; UTC without one.
      values: what the template names.
    """
    offset = views.utc_offset_hours(local) if local is not None else 0.0
    script = (_FOLDER / "page.js.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formatting.number,
        "share": formatting.share,
        "words": formatting.words,
        "rival": formatting.rival,
        "moment": lambda unix_s: formatting.moment(unix_s, offset),
    }
    environment.globals |= {"models": MODELS, "views": views}
    return environment.get_template(template).render(
        script=Markup(script), script_hash=f"sha256-{digest}", **values
    )


def write_files(files: Mapping[str, str], destination: Path) -> None:
    """Writes texts; each file appears complete, in place of an older one."""
    destination.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".report-", dir=destination.parent))
    try:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name in files:
            os.replace(temporary / name, destination / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
