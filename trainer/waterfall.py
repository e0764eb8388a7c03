"""Where the funnel lost what people went on to choose.

Every held-out positive goes through the stages of the funnel in their order; the first that does not pass it
on has lost it. What is left at the end was among the items shown. Sources and stages are plain lists: a new
source is a further entry, a new stage a further mask in its place.

Letters: P = held-out positives, pairs of a user and an item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from schema.errors import ShapeError
from trainer.facts_file import read_facts, write_facts
from trainer.metrics import BoolArray

WATERFALL_FILE = "waterfall.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the funnel.

    Attributes:
      loss: what happened to a positive that the stage did not pass on, for instance `ranked below 20`.
      passes: bool [P], whether it passes each positive on.
    """

    loss: str
    passes: BoolArray


@dataclasses.dataclass(frozen=True)
class SourceFacts:
    """What one source of candidates contributes.

    Attributes:
      name: of the source.
      depth: candidates that it was asked for.
      recall: share of the positives that the sources could find which it found; None without such positives.
      unique_recall: share that it found and no other source did.
      overlap: other source -> share of the positives found by this one that the other found too; None where
        this one found none.
    """

    name: str
    depth: int
    recall: float | None
    unique_recall: float | None
    overlap: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class SliceLosses:
    """What became of the positives of one slice.

    Attributes:
      slice: dimension and value; empty for all positives.
      num_positives: in the slice.
      lost: loss -> positives lost there, in the order of the stages.
      shown: positives that no stage lost.
    """

    slice: Mapping[str, str]
    num_positives: int
    lost: Mapping[str, int]
    shown: int


@dataclasses.dataclass(frozen=True)
class Waterfall:
    """The waterfall of one pair of models; waterfall.json holds the same.

    Attributes:
      num_users: users whose positives were followed.
      num_users_with_positives: of whom they are a sample.
      k: items shown.
      num_candidates: items that the ranker scores.
      slices: all positives first.
      sources: as they were asked.
    """

    num_users: int
    num_users_with_positives: int
    k: int
    num_candidates: int
    slices: tuple[SliceLosses, ...]
    sources: tuple[SourceFacts, ...]

    @property
    def whole(self) -> SliceLosses:
        """All positives."""
        return self.slices[0]


def in_lists(
    users: Sequence[int] | np.ndarray, items: Sequence[str], lists: Sequence[Collection[str]]
) -> BoolArray:
    """Which positives are in the lists of their users.

    Args:
      users: [P], place of the user in `lists`.
      items: [P], item ids.
      lists: item ids per user.

    Returns:
      bool [P].
    """
    sets = [frozenset(values) for values in lists]
    return np.fromiter(
        (item in sets[user] for user, item in zip(users, items, strict=True)), np.bool_, len(items)
    )


def losses(stages: Sequence[Stage], dimensions: Mapping[str, Sequence[str]]) -> tuple[SliceLosses, ...]:
    """Gives each positive to the first stage that did not pass it on, in all and by slice.

    Args:
      stages: in the order of the funnel.
      dimensions: name of a dimension -> [P], the value of each positive.

    Returns:
      All positives, then the values of each dimension, by name.

    Raises:
      ShapeError: stages or dimensions differ in length, or there is no stage.
    """
    lengths = {len(stage.passes) for stage in stages} | {len(values) for values in dimensions.values()}
    if len(lengths) != 1 or not stages:
        raise ShapeError(f"stages and dimensions of {sorted(lengths)} positives; expected one length of all")
    passed = np.stack([*(stage.passes for stage in stages), np.zeros(lengths.pop(), np.bool_)])
    first_failed = np.argmin(passed, axis=0)

    def count(which: BoolArray, key: Mapping[str, str]) -> SliceLosses:
        counts = np.bincount(first_failed[which], minlength=len(stages) + 1)
        lost = {stage.loss: int(number) for stage, number in zip(stages, counts, strict=False)}
        return SliceLosses(key, int(which.sum()), lost, int(counts[-1]))

    found = [count(np.ones(passed.shape[1], np.bool_), {})]
    for name, values in dimensions.items():
        column = np.asarray(values, dtype=object)
        found += [count(column == value, {name: str(value)}) for value in sorted(set(values))]
    return tuple(found)


def source_facts(
    found: Mapping[str, BoolArray], depths: Mapping[str, int], findable: BoolArray
) -> tuple[SourceFacts, ...]:
    """What each source contributes to the positives that any source could find.

    Args:
      found: source -> bool [P], whether it found each positive.
      depths: source -> candidates that it was asked for.
      findable: bool [P], positives that may be recommended at all.
    """
    total = int(findable.sum())
    hits = {name: mask & findable for name, mask in found.items()}
    by_any = np.sum(list(hits.values()), axis=0)
    return tuple(
        SourceFacts(
            name,
            depths[name],
            _share(mask, total),
            _share(mask & (by_any == 1), total),
            {
                other: _share(mask & theirs, int(mask.sum()))
                for other, theirs in hits.items()
                if other != name
            },
        )
        for name, mask in hits.items()
    )


def _share(mask: BoolArray, total: int) -> float | None:
    return float(mask.sum() / total) if total else None


def write_waterfall(waterfall: Waterfall, folder: Path) -> None:
    """Writes waterfall.json into a folder."""
    write_facts(waterfall, folder / WATERFALL_FILE)


def read_waterfall(folder: Path) -> Waterfall:
    """The inverse of `write_waterfall`.

    Raises:
      DataError: no such file, or one of another version of Funnel.
    """
    return read_facts(Waterfall, folder / WATERFALL_FILE)
