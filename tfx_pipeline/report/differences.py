"""What lies between two runs: data, configuration and versions, so that nobody compares figures blindly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tfx_pipeline.report import formatting
from tfx_pipeline.report.facts import Differences, RunFacts, Setting

# Entries of a list are known by one of these, not by their place in it.
_NAMES = ("name", "metric")


def differences(before: RunFacts, after: RunFacts) -> Differences:
    """Compares what two runs were made of; their figures are not looked at."""
    unknown = []
    pieces = {
        "data": (_data(before), _data(after)),
        "config": (_config(before), _config(after)),
        "versions": (_versions(before), _versions(after)),
    }
    for piece, (old, new) in pieces.items():
        if not old or not new:
            unknown.append(piece)
    found = {piece: () if piece in unknown else _changed(old, new) for piece, (old, new) in pieces.items()}
    return Differences(
        before=before.run_id,
        after=after.run_id,
        data=found["data"],
        config=found["config"],
        versions=found["versions"],
        unknown=tuple(unknown),
    )


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Setting, ...]:
    names = dict.fromkeys([*old, *new])
    return tuple(
        Setting(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)
    )


def _data(facts: RunFacts) -> dict[str, str]:
    """What describes the tables, in words; nothing when their summary could not be read."""
    summary = facts.summary
    if summary is None:
        return {}
    values = {"dataset": summary.dataset}
    for split, rows in summary.rows.items():
        values[f"{split} rows"] = formatting.number(rows)
        values[f"{split} positives"] = formatting.number(summary.positives.get(split))
        for label, moments in (
            ("first event (UTC)", summary.first_event_unix_s),
            ("last event (UTC)", summary.last_event_unix_s),
        ):
            if split in moments:
                values[f"{split} {label}"] = formatting.moment(moments[split], 0.0)
    values |= {"users": formatting.number(summary.users), "items": formatting.number(summary.items)}
    values |= {
        f"mean {formatting.words(label)} (train)": formatting.decimal(mean)
        for label, mean in summary.label_means.items()
    }
    if facts.data_fingerprint:
        values["fingerprint of the tables"] = facts.data_fingerprint
    return values


def _config(facts: RunFacts) -> dict[str, str]:
    return dict(_leaves(facts.config)) if facts.config else {}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """`retrieval.index.min_recall` -> `0.95`; entries of lists go by name: `gates[ranking/click/auc].min`."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        for place, entry in enumerate(value):
            name = next((entry[key] for key in _NAMES if key in entry), place)
            rest = {key: inner for key, inner in entry.items() if key not in _NAMES}
            yield from _leaves(rest, f"{path}[{name}]")
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _versions(facts: RunFacts) -> dict[str, str]:
    return {**facts.versions, "Funnel": facts.code_version or facts.funnel_version} if facts.versions else {}
