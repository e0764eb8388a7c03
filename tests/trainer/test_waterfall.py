"""Each positive is lost once, at the first stage that dropped it; sources against loops over sets."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from schema.errors import DataError, ShapeError
from trainer.uncertainty import intervals, ratio_of_sums
from trainer.waterfall import (
    SHOWN,
    Positives,
    Stage,
    Waterfall,
    in_lists,
    losses,
    read_waterfall,
    rule,
    source_facts,
    write_waterfall,
)

LOSSES = ("not in the catalogue", "not in any source", "cut", "ranked low")


def mask(*values: int) -> np.ndarray:
    return np.array(values, np.bool_)


def positives(
    count: int, dimensions: dict[str, list[str]] | None = None, num_users: int | None = None
) -> Positives:
    """Of a user each, or dealt out to users in turn; all of an item each."""
    users = np.arange(count) % (num_users or max(1, count))
    return Positives(users, [f"i{place}" for place in range(count)], dimensions or {})


def test_a_positive_is_lost_at_the_first_stage_that_drops_it() -> None:
    """By hand: row 0 is shown, 1 and 4 fail the second stage, 2 the first, 3 the last."""
    stages = [
        Stage("absent", mask(1, 1, 0, 1, 1)),
        Stage("unfound", mask(1, 0, 0, 1, 0)),
        # Passing later what was lost before changes nothing.
        Stage("low", mask(1, 1, 1, 0, 0)),
    ]
    followed = positives(5, {"user_type": ["warm", "cold", "warm", "warm", "cold"]})
    # The larger part first.
    whole, warm, cold = losses(followed, stages)
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
    stages = [Stage(name, row) for name, row in zip(LOSSES, passes, strict=True)]
    found = losses(positives(300, {"surface": surfaces}), stages)
    largest_first = sorted(set(surfaces), key=surfaces.count, reverse=True)
    assert [dict(part.slice) for part in found] == [{}, *({"surface": s} for s in largest_first)]
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


def test_a_new_rule_takes_what_it_drops_from_the_later_ones_alone() -> None:
    stages = [Stage("unfound", mask(1, 1, 1, 0)), Stage("low", mask(1, 0, 0, 1))]
    too_old = rule("too old", mask(1, 0, 1, 0))
    (before,), (after,) = (losses(positives(4), found) for found in (stages, [stages[0], too_old, stages[1]]))
    assert before.lost == {"unfound": 1, "low": 2}
    assert after.lost == {"unfound": 1, "removed by a rule: too old": 2, "low": 1}
    assert (before.shown, after.shown) == (1, 0)


def test_shares_have_the_interval_of_a_ratio_over_users() -> None:
    """40 users of five positives each; half of the users lose all of theirs, as users often do."""
    followed = positives(200, {"half": ["first" if place < 100 else "second" for place in range(200)]}, 40)
    loses = followed.users % 2 == 0
    whole, first, _ = losses(followed, [Stage("cut", ~loses)])
    by_user = ratio_of_sums(np.bincount(followed.users, loses), np.bincount(followed.users))
    expected = intervals({"cut": by_user})["cut"]
    assert whole.bounds["cut"] == (expected.low, expected.high)
    # Rows that were independent would give 0.5 ± 0.07; users do not.
    assert expected.high - expected.low > 0.25
    assert whole.bounds[SHOWN] == pytest.approx((1 - expected.high, 1 - expected.low))
    assert first.bounds["cut"][0] < 0.5 < first.bounds["cut"][1]


def test_few_users_have_no_interval() -> None:
    (whole,) = losses(positives(50, num_users=9), [Stage("cut", np.arange(50) < 20)])
    assert (whole.lost, whole.shown, whole.bounds) == ({"cut": 30}, 20, {})


def test_no_positives_are_no_losses() -> None:
    (whole,) = losses(positives(0, {"surface": []}), [Stage("cut", mask())])
    assert (whole.num_positives, whole.lost, whole.shown) == (0, {"cut": 0}, 0)


@pytest.mark.parametrize(
    "stages", [[], [Stage("a", mask(1)), Stage("b", mask(1, 0))]], ids=["no stage", "stages differ"]
)
def test_stages_of_other_lengths_are_refused(stages: list[Stage]) -> None:
    with pytest.raises(ShapeError, match="expected 1"):
        losses(positives(1), stages)


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(ShapeError, match="a name of its own"):
        losses(positives(2), [Stage("cut", mask(1, 0)), Stage("cut", mask(0, 1))])


def test_positives_of_differing_lengths_are_refused() -> None:
    with pytest.raises(ShapeError, match="one length"):
        Positives(np.array([0]), ["a"], {"s": []})


def test_a_positive_is_looked_for_in_the_list_of_its_own_user() -> None:
    followed = Positives(np.array([0, 0, 1, 2]), ["a", "b", "b", "a"])
    assert in_lists(followed, [["a", "c"], ["a", "b"], []]).tolist() == [True, False, True, False]


def test_unique_recall_and_overlap_agree_with_sets() -> None:
    rng = np.random.default_rng(9)
    names = ("two-tower", "trending", "co-watched")
    found = {name: rng.random(200) < share for name, share in zip(names, (0.6, 0.3, 0.1), strict=True)}
    findable = rng.random(200) < 0.9
    facts = source_facts(positives(200), found, dict.fromkeys(names, 50), findable)
    sets = {name: {p for p in range(200) if found[name][p] and findable[p]} for name in names}
    total = sum(findable)
    for fact in facts:
        own = sets[fact.name]
        others = set().union(*(sets[name] for name in names if name != fact.name))
        assert fact.depth == 50
        assert fact.recall == pytest.approx(len(own) / total)
        assert fact.unique_recall == pytest.approx(len(own - others) / total)
        for value, bounds in ((fact.recall, fact.recall_bounds), (fact.unique_recall, fact.unique_bounds)):
            assert bounds is not None and bounds[0] < value < bounds[1] < bounds[0] + 0.2
    for first, second in itertools.permutations(facts, 2):
        expected = len(sets[first.name] & sets[second.name]) / len(sets[first.name])
        assert first.overlap[second.name] == pytest.approx(expected)


def test_a_source_that_finds_nothing_has_no_overlap_and_nothing_to_find_has_no_recall() -> None:
    masks, depths = {"a": mask(0, 0), "b": mask(1, 1)}, {"a": 1, "b": 1}
    empty, full = source_facts(positives(2), masks, depths, mask(1, 1))
    assert (empty.recall, empty.overlap["b"]) == (0.0, None)
    assert (full.unique_recall, full.overlap["a"]) == (1.0, 0.0)
    assert source_facts(positives(1), {"a": mask(1)}, {"a": 1}, mask(0))[0].recall is None


def test_the_facts_survive_the_file(tmp_path: Path) -> None:
    followed = positives(24, {"s": ["x", "y"] * 12}, 12)
    found = np.arange(24) < 9
    facts = source_facts(followed, {"a": found, "b": ~found}, {"a": 5, "b": 5}, np.ones(24, np.bool_))
    waterfall = Waterfall(1, 3, 20, 100, losses(followed, [Stage("cut", found)]), facts)
    write_waterfall(waterfall, tmp_path / "facts")
    assert read_waterfall(tmp_path / "facts") == waterfall


def test_a_file_that_is_absent_or_of_another_kind_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*waterfall\.json"):
        read_waterfall(tmp_path)
    (tmp_path / "waterfall.json").write_text('{"k": 3}')
    with pytest.raises(DataError, match="cannot be read by this version"):
        read_waterfall(tmp_path)
