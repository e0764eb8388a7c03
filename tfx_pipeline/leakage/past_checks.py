"""Do the examples hold what was known at their event, no more, and are the splits in time order?"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from schema.contract import DatasetSpec
from tfx_pipeline.leakage.findings import Check, judged
from tfx_pipeline.leakage.known_past import KnownPast, Values, differs
from tfx_pipeline.leakage.recorded import KEY
from trainer import features


def check_recomputed(samples: Mapping[str, pl.DataFrame], past: KnownPast) -> Check:
    """Compares every feature of sampled interaction examples with what is recomputed as of their event.

    Args:
      samples: by split, as `recorded.read_split` returns them.
      past: knows the users and items of the samples.
    """
    findings: list[str] = []
    count = 0
    for split, sample in samples.items():
        for example in sample.iter_rows(named=True):
            count += 1
            finding = _compare_interaction(example, past)
            if finding:
                findings.append(f"{split}: {finding}")
    detail = f"{count:,} examples of {', '.join(samples)}: every feature as of the event time"
    return judged("features recomputed", detail, findings)


def _compare_interaction(example: Mapping[str, Values], past: KnownPast) -> str:
    user_id, item_id, time = (example[name][0] for name in KEY)
    events = [
        e
        for e in past.events_of(user_id)
        if e[features.ITEM_ID] == item_id and e[features.EVENT_TIME] == time
    ]
    # An interaction may be logged more than once in a second: the example is one of them.
    compared = [_differences(example, past.interaction(event)) for event in events]
    if not compared:
        return f"no interaction of {user_id} with {item_id} at {time} is in the tables"
    return _worded(min(compared, key=len), f"{user_id}, {item_id}, {time}")


def check_states(user_states: pl.DataFrame, catalogue: pl.DataFrame, past: KnownPast) -> Check:
    """Compares sampled user states and catalogue examples with what was known at the end of training.

    Args:
      user_states, catalogue: samples, every feature a list.
      past: knows their users and items.
    """
    findings = []
    for example in user_states.iter_rows(named=True):
        user_id = example[features.USER_ID][0]
        # Without an event the surface is a choice of the pipeline, no knowledge.
        expected = past.user_state(user_id)
        findings.append(_worded(_differences(example, expected), f"user state {user_id}"))
    for example in catalogue.iter_rows(named=True):
        item_id = example[features.ITEM_ID][0]
        findings.append(_worded(_differences(example, past.catalogue_item(item_id)), f"item {item_id}"))
    detail = f"{len(user_states):,} user states and {len(catalogue):,} items as of the end of training"
    return judged("states recomputed", detail, [finding for finding in findings if finding])


def check_strictly_before(samples: Mapping[str, pl.DataFrame], past: KnownPast, spec: DatasetSpec) -> Check:
    """Looks at times alone: what an example says of the past happened before its event.

    Every impression is earlier than the event, and every item of the history was chosen earlier.

    Args:
      samples: by split.
      past: knows the users of the samples.
      spec: the declaration.
    """
    findings = []
    count = 0
    for split, sample in samples.items():
        for example in sample.iter_rows(named=True):
            count += 1
            user_id, item_id, time = (example[name][0] for name in KEY)
            late = [shown for shown in example[features.IMPRESSION_TIMES] if shown >= time]
            if late:
                findings.append(
                    f"{split}: {user_id}, {item_id}, {time} has {len(late)} impressions of its own time or "
                    f"later, the latest {max(late) - time:,} s after it"
                )
            known = Counter(
                e[features.ITEM_ID]
                for e in past.events_of(user_id)
                if e[features.EVENT_TIME] < time and (e[spec.positive] or 0) > 0
            )
            unknown = Counter(example[features.HISTORY]) - known
            if unknown:
                findings.append(
                    f"{split}: {user_id}, {item_id}, {time} has a history with {', '.join(unknown)}, "
                    "not chosen before the event"
                )
    detail = f"{count:,} examples: histories and impressions end strictly before the event"
    return judged("the past only", detail, findings)


def check_splits(keys: Mapping[str, pl.DataFrame], interactions: pl.DataFrame, spec: DatasetSpec) -> Check:
    """Checks on every example that splits follow each other, share no row, and are those of the tables.

    Splits by fractions may meet within one second: rows of equal time are cut by their order in the file.

    Args:
      keys: by split, in time order of the splits, as `recorded.read_split` returns them.
      interactions: the contract table.
      spec: the declaration.
    """
    findings = []
    names = list(keys)
    for first, second in itertools.pairwise(names):
        end, start = keys[first][features.EVENT_TIME].max(), keys[second][features.EVENT_TIME].min()
        assert isinstance(end, int) and isinstance(start, int)  # int64 columns that are not empty
        if end > start or (end == start and spec.split.fractions is None):
            findings.append(f"{first} ends at {end}, {second} starts at {start}: not later")
    for name, rows in keys.items():
        table = interactions.filter(pl.col("split") == name)
        if not _counted(rows).equals(_counted(table)):
            findings.append(f"{name}: {len(rows):,} examples are not the {len(table):,} rows of the table")
    tagged = pl.concat([rows.select(*KEY, pl.lit(name).alias("split")) for name, rows in keys.items()])
    shared = tagged.unique().group_by(KEY).len().filter(pl.col("len") > 1)
    if len(shared):
        example = shared.sort(KEY).select(KEY).row(0)
        findings.append(f"{len(shared):,} interactions are in more than one split, such as {example}")
    counts = ", ".join(f"{name} {len(rows):,}" for name, rows in keys.items())
    return judged("temporal splits", f"all examples: {counts}", findings)


def _counted(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.group_by(KEY).len().sort(KEY)


def _differences(example: Mapping[str, Values], expected: Mapping[str, Values]) -> dict[str, tuple[Any, Any]]:
    return {name: (example[name], value) for name, value in expected.items() if differs(example[name], value)}


def _worded(differences: Mapping[str, tuple[Any, Any]], where: str) -> str:
    if not differences:
        return ""
    name, (recorded, expected) = next(iter(differences.items()))
    others = f" (and {len(differences) - 1} more features)" if len(differences) > 1 else ""
    return f"{where}: {name} is {_short(recorded)}, expected {_short(expected)}{others}"


def _short(values: Iterable[Any]) -> str:
    """A list as people read it: where it is long, how long, and its end, where the newest stands."""
    listed = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return f"[{', '.join(listed)}]" if len(listed) <= 4 else f"{len(listed)} values ending {listed[-3:]}"
