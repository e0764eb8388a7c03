"""Each positive is lost once, at the first stage that dropped it; sources against loops over sets."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from schema.errors import DataError, ShapeError
from trainer.waterfall import (
    Stage,
    Waterfall,
    in_lists,
    losses,
    read_waterfall,
    source_facts,
    write_waterfall,
)

LOSSES = ("not in the catalogue", "not in any source", "cut", "ranked low")


def mask(*values: int) -> np.ndarray:
    return np.array(values, np.bool_)


def test_a_positive_is_lost_at_the_first_stage_that_drops_it() -> None:
    """By hand: row 0 is shown, 1 and 4 fail the second stage, 2 the first, 3 the last."""
    stages = [
        Stage("absent", mask(1, 1, 0, 1, 1)),
        Stage("unfound", mask(1, 0, 0, 1, 0)),
        # Passing later what was lost before changes nothing.
        Stage("low", mask(1, 1, 1, 0, 0)),
    ]
    whole, cold, warm = losses(stages, {"user_type": ["warm", "cold", "warm", "warm", "cold"]})
    assert (whole.num_positives, whole.shown) == (5, 1)
    assert whole.lost == {"absent": 1, "unfound": 2, "low": 1}
    assert (dict(cold.slice), cold.lost, cold.shown) == (
        {"user_type": "cold"}, {"absent": 0, "unfound": 2, "low": 0}, 0,
    )  # fmt: skip
    assert (dict(warm.slice), warm.lost, warm.shown) == (
        {"user_type": "warm"}, {"absent": 1, "unfound": 0, "low": 1}, 1,
    )  # fmt: skip


def test_losses_agree_with_following_each_positive_by_itself() -> None:
    rng = np.random.default_rng(3)
    passes = rng.random((4, 300)) < 0.7
    surfaces = [("home", "feed", "search")[n] for n in rng.integers(3, size=300)]
    found = losses(
        [Stage(name, row) for name, row in zip(LOSSES, passes, strict=True)], {"surface": surfaces}
    )
    assert [dict(part.slice) for part in found] == [{}, *({"surface": s} for s in ("feed", "home", "search"))]
    for part in found:
        counts = dict.fromkeys((*LOSSES, "shown"), 0)
        for positive in range(300):
            if part.slice and surfaces[positive] != part.slice["surface"]:
                continue
            end = "shown"
            for stage, name in enumerate(LOSSES):
                if not passes[stage][positive]:
                    end = name
                    break
            counts[end] += 1
        assert {**part.lost, "shown": part.shown} == counts
        assert part.num_positives == sum(counts.values())


def test_a_new_stage_takes_what_it_drops_from_the_later_ones_alone() -> None:
    stages = [Stage("unfound", mask(1, 1, 1, 0)), Stage("low", mask(1, 0, 0, 1))]
    rule = Stage("removed by a rule", mask(0, 1, 0, 1))
    (before,), (after,) = losses(stages, {}), losses([stages[0], rule, stages[1]], {})
    assert before.lost == {"unfound": 1, "low": 2}
    assert after.lost == {"unfound": 1, "removed by a rule": 2, "low": 1}
    assert (before.shown, after.shown) == (1, 0)


def test_no_positives_are_no_losses() -> None:
    (whole,) = losses([Stage("cut", mask())], {"surface": []})
    assert (whole.num_positives, whole.lost, whole.shown) == (0, {"cut": 0}, 0)


@pytest.mark.parametrize(
    ("stages", "dimensions"),
    [([], {}), ([Stage("a", mask(1)), Stage("b", mask(1, 0))], {}), ([Stage("a", mask(1))], {"s": []})],
    ids=["no stage", "stages differ", "dimension differs"],
)
def test_lengths_that_differ_are_refused(stages: list[Stage], dimensions: dict[str, list[str]]) -> None:
    with pytest.raises(ShapeError, match="one length"):
        losses(stages, dimensions)


def test_a_positive_is_looked_for_in_the_list_of_its_own_user() -> None:
    found = in_lists([0, 0, 1, 2], ["a", "b", "b", "a"], [["a", "c"], ["a", "b"], []])
    assert found.tolist() == [True, False, True, False]


def test_unique_recall_and_overlap_agree_with_sets() -> None:
    rng = np.random.default_rng(9)
    names = ("two-tower", "trending", "co-watched")
    found = {name: rng.random(200) < share for name, share in zip(names, (0.6, 0.3, 0.1), strict=True)}
    findable = rng.random(200) < 0.9
    facts = source_facts(found, dict.fromkeys(names, 50), findable)
    sets = {name: {p for p in range(200) if found[name][p] and findable[p]} for name in names}
    total = sum(findable)
    for fact in facts:
        own = sets[fact.name]
        others = set().union(*(sets[name] for name in names if name != fact.name))
        assert fact.depth == 50
        assert fact.recall == pytest.approx(len(own) / total)
        assert fact.unique_recall == pytest.approx(len(own - others) / total)
    for first, second in itertools.permutations(facts, 2):
        expected = len(sets[first.name] & sets[second.name]) / len(sets[first.name])
        assert first.overlap[second.name] == pytest.approx(expected)


def test_a_source_that_finds_nothing_has_no_overlap_and_nothing_to_find_has_no_recall() -> None:
    empty, full = source_facts({"a": mask(0, 0), "b": mask(1, 1)}, {"a": 1, "b": 1}, mask(1, 1))
    assert (empty.recall, empty.overlap["b"]) == (0.0, None)
    assert (full.unique_recall, full.overlap["a"]) == (1.0, 0.0)
    assert source_facts({"a": mask(1)}, {"a": 1}, mask(0))[0].recall is None


def test_the_facts_survive_the_file(tmp_path: Path) -> None:
    facts = source_facts({"a": mask(1, 0), "b": mask(0, 0)}, {"a": 5, "b": 5}, mask(1, 1))
    waterfall = Waterfall(1, 3, 20, 100, losses([Stage("cut", mask(1, 0))], {"s": ["x", "y"]}), facts)
    write_waterfall(waterfall, tmp_path / "facts")
    assert read_waterfall(tmp_path / "facts") == waterfall


def test_a_file_that_is_absent_or_of_another_kind_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*waterfall\.json"):
        read_waterfall(tmp_path)
    (tmp_path / "waterfall.json").write_text('{"k": 3}')
    with pytest.raises(DataError, match="cannot be read by this version"):
        read_waterfall(tmp_path)
