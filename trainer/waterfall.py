"""Where the funnel lost what people went on to choose.

Every held-out positive goes through the stages of the funnel in their order; the first that does not pass it
on has lost it. What is left at the end was among the items shown. Sources, rules and stages are plain lists:
a new one is a further entry. Shares have intervals over users: positives of a user depend on each other.

    positives = Positives(users, items, {"surface": surfaces})
    losses(positives, [rule("watched", seen), Stage("not found", found), Stage("ranked low", shown)])

Letters: P = held-out positives, pairs of a user and an item; U = users.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from schema.errors import ShapeError
from trainer.facts_file import read_facts, write_facts
from trainer.metrics import BoolArray, IntArray
from trainer.uncertainty import Interval, UserSums, intervals, ratio_of_sums

WATERFALL_FILE = "waterfall.json"
SHOWN = "shown"
# Lower and upper bound of a share.
Bounds = tuple[float, float]
_RECALL, _UNIQUE = "recall", "unique"


@dataclasses.dataclass(frozen=True)
class Positives:
    """What is followed: pairs of a user and an item that the user went on to choose.

    Attributes:
      users: int64 [P], 0 to U − 1.
      items: [P], item ids.
      dimensions: name of a dimension -> [P], the value of each positive.
    """

    users: IntArray
    items: Sequence[str]
    dimensions: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(self.users), len(self.items), *map(len, self.dimensions.values())}
        if len(lengths) != 1:
            raise ShapeError(
                f"users, items and dimensions of {sorted(lengths)} positives; expected one length"
            )

    def __len__(self) -> int:
        return len(self.items)

    def share(self, part: BoolArray, of: BoolArray) -> UserSums:
        """The share of some positives, bool [P], among others, ready for intervals over users."""
        return ratio_of_sums(np.bincount(self.users, part & of), np.bincount(self.users, of))


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
      recall_bounds, unique_bounds: interval of either; None with too few users, or of 0 and 1.
    """

    name: str
    depth: int
    recall: float | None
    unique_recall: float | None
    overlap: Mapping[str, float | None]
    recall_bounds: Bounds | None = None
    unique_bounds: Bounds | None = None


@dataclasses.dataclass(frozen=True)
class SliceLosses:
    """What became of the positives of one slice.

    Attributes:
      slice: dimension and value; empty for all positives.
      num_positives: in the slice.
      lost: loss -> positives lost there, in the order of the stages.
      shown: positives that no stage lost.
      bounds: loss, or SHOWN -> interval of its share of the slice; none with too few users, or of 0 and 1.
    """

    slice: Mapping[str, str]
    num_positives: int
    lost: Mapping[str, int]
    shown: int
    bounds: Mapping[str, Bounds] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Waterfall:
    """The waterfall of one pair of models; waterfall.json holds the same.

    Attributes:
      num_users: users whose positives were followed.
      num_users_with_positives: of whom they are a sample.
      k: items shown.
      num_candidates: items that the ranker scores.
      slices: all positives first, then each dimension, its largest part first.
      sources: as they were asked.
      confidence: of the intervals.
    """

    num_users: int
    num_users_with_positives: int
    k: int
    num_candidates: int
    slices: tuple[SliceLosses, ...]
    sources: tuple[SourceFacts, ...]
    confidence: float = 0.95

    @property
    def whole(self) -> SliceLosses:
        """All positives."""
        return self.slices[0]


def in_lists(positives: Positives, lists: Sequence[Collection[str]]) -> BoolArray:
    """Which positives are in the lists of their users.

    Args:
      positives: of U users.
      lists: [U], item ids.

    Returns:
      bool [P].
    """
    sets = [frozenset(values) for values in lists]
    pairs = zip(positives.users, positives.items, strict=True)
    return np.fromiter((item in sets[user] for user, item in pairs), np.bool_, len(positives))


def rule(name: str, removed: BoolArray) -> Stage:
    """The stage of a rule that removes items whatever the models think: watched ones, those not allowed.

    Args:
      name: of the rule.
      removed: bool [P], whether it removes each positive.
    """
    return Stage(f"removed by a rule: {name}", ~removed)


def losses(positives: Positives, stages: Sequence[Stage]) -> tuple[SliceLosses, ...]:
    """Gives each positive to the first stage that did not pass it on, in all and by slice.

    Args:
      positives: what is followed.
      stages: in the order of the funnel.

    Returns:
      All positives, then the values of each dimension, by name.

    Raises:
      ShapeError: a stage has not one entry per positive, two have one name, or there is no stage.
    """
    lengths = {len(stage.passes) for stage in stages}
    if lengths != {len(positives)}:
        raise ShapeError(f"stages of {sorted(lengths)} positives; expected {len(positives)}, and a stage")
    passed = np.stack([*(stage.passes for stage in stages), np.zeros(len(positives), np.bool_)])
    first_failed = np.argmin(passed, axis=0)
    ends = [*(stage.loss for stage in stages), SHOWN]
    if len(set(ends)) < len(ends):
        raise ShapeError(f"stages lose positives as {ends}; expected a name of its own for each.")
    parts: list[tuple[dict[str, str], BoolArray]] = [({}, np.ones(len(positives), np.bool_))]
    for name, values in positives.dimensions.items():
        column = np.asarray(values, dtype=object)
        largest_first = sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))
        parts += [({name: str(value)}, column == value) for value, _ in largest_first]
    # All at once: the same draws of users for all shares.
    found = intervals(
        {
            f"{place} {end}": positives.share(first_failed == number, mask)
            for place, (_, mask) in enumerate(parts)
            for number, end in enumerate(ends)
        }
    )
    result = []
    for place, (key, mask) in enumerate(parts):
        counts = np.bincount(first_failed[mask], minlength=len(ends))
        lost = {end: int(count) for end, count in zip(ends, counts, strict=True)}
        bounds = {end: _bounds(found[f"{place} {end}"]) for end in ends}
        result.append(
            SliceLosses(
                key,
                int(mask.sum()),
                lost,
                lost.pop(SHOWN),
                {end: bound for end, bound in bounds.items() if bound is not None},
            )
        )
    return tuple(result)


def source_facts(
    positives: Positives, found: Mapping[str, BoolArray], depths: Mapping[str, int], findable: BoolArray
) -> tuple[SourceFacts, ...]:
    """What each source contributes to the positives that any source could find.

    Args:
      positives: what is followed.
      found: source -> bool [P], whether it found each positive.
      depths: source -> candidates that it was asked for.
      findable: bool [P], positives that may be recommended at all.
    """
    by_any = np.sum(list(found.values()), axis=0)
    result = []
    for name, mask in found.items():
        shares = {
            _RECALL: positives.share(mask, findable),
            _UNIQUE: positives.share(mask & (by_any == 1), findable),
        }
        overlap = {
            other: _defined(positives.share(theirs, mask & findable).value)
            for other, theirs in found.items()
            if other != name
        }
        bounds = intervals(shares)
        recall, unique = bounds[_RECALL], bounds[_UNIQUE]
        result.append(
            SourceFacts(
                name,
                depths[name],
                _defined(recall.value),
                _defined(unique.value),
                overlap,
                _bounds(recall),
                _bounds(unique),
            )
        )
    return tuple(result)


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _bounds(interval: Interval) -> Bounds | None:
    """None also of a share of 0 or 1: draws of the same users never differ, which says nothing of others."""
    return (interval.low, interval.high) if interval.low < interval.high else None


def write_waterfall(waterfall: Waterfall, folder: Path) -> None:
    """Writes waterfall.json into a folder."""
    write_facts(waterfall, folder / WATERFALL_FILE)


def read_waterfall(folder: Path) -> Waterfall:
    """The inverse of `write_waterfall`.

    Raises:
      DataError: no such file, or one of another version of Funnel.
    """
    return read_facts(Waterfall, folder / WATERFALL_FILE)
