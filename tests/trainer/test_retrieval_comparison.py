"""Lists of a model against those of its rivals: a world small enough to work out by hand."""

import dataclasses
import doctest

import numpy as np
import polars as pl
import pytest

from tests import oracles
from trainer import retrieval_comparison
from trainer.comparison import BootstrapSettings, Comparison
from trainer.metrics import CatalogueFacts
from trainer.retrieval_comparison import (
    JudgedLists,
    compare_retrieval,
    lists_table,
    metric_keys,
    positives_table,
)

ITEMS = [f"i{code}" for code in range(8)]
SETTINGS = BootstrapSettings(num_resamples=200)
R2 = "retrieval/recall_at_2"


def test_the_examples_of_the_documentation_hold() -> None:
    assert doctest.testmod(retrieval_comparison).failed == 0


@pytest.fixture
def judged() -> JudgedLists:
    """Users a (two positives, one cold), b (one), c (one); lists of three items."""
    positives = pl.DataFrame(
        {
            "user": [0, 0, 1, 2],
            "item": [1, 7, 2, 3],
            "is_cold": [False, True, False, False],
            "user_type": ["warm", "warm", "warm", "cold"],
            "item_popularity": ["head", "cold", "tail", "head"],
        }
    )
    return JudgedLists(
        ["a", "b", "c"],
        positives,
        {
            "candidate": np.array([[1, 7, 0], [0, 4, 2], [3, 5, -1]]),
            "last_blessed": np.array([[1, 0, 4], [2, 0, 4], [5, 4, 0]]),
            "popularity": np.array([[0, 4, 5], [0, 4, 5], [0, 4, 5]]),
        },
    )


def compared(judged: JudgedLists, by: tuple[tuple[str, ...], ...] = (("item_popularity",),)) -> Comparison:
    return compare_retrieval(judged, (2, 3), by, {"popularity": "train positives"}, {}, SETTINGS)


def test_figures_of_the_whole_split_are_means_over_users(judged: JudgedLists) -> None:
    whole = compared(judged).whole
    assert (whole.slice, whole.num_users, whole.num_rows) == ((), 3, 3)
    recall = whole.metric(R2)
    assert recall is not None
    # a finds both, b none among the first two, c one.
    assert recall.value == pytest.approx((1 + 0 + 1) / 3)
    assert recall.count == 3
    # The last blessed model finds one of two, all of one, none of one.
    blessed = recall.against["last_blessed"]
    assert blessed.value == pytest.approx((0.5 + 1 + 0) / 3)
    assert blessed.difference == pytest.approx((0.5 - 1 + 1) / 3)
    assert recall.against["popularity"].value == 0
    cold = whole.metric("retrieval/cold_item_recall_at_2")
    assert cold is not None and (cold.value, cold.count) == (1.0, 1)
    distinct = whole.metric("retrieval/distinct_items_at_2")
    # Items 1, 7, 0, 4, 3, 5 stand in somebody's first two; a count has no interval.
    assert distinct is not None and (distinct.value, distinct.low) == (6, None)
    assert distinct.against["popularity"].difference == 4


def test_figures_agree_with_the_oracles(judged: JudgedLists) -> None:
    whole = compared(judged).whole
    for name, oracle in (("ndcg", oracles.ndcg_at_k), ("mrr", oracles.mrr_at_k)):
        for k in (2, 3):
            result = whole.metric(f"retrieval/{name}_at_{k}")
            expected = [
                oracle(
                    [str(code) for code in row if code >= 0],
                    judged.positives.filter(user=user)["item"].cast(str).to_list(),
                    k,
                )
                for user, row in enumerate(judged.lists["candidate"])
            ]
            assert result is not None and result.value == pytest.approx(np.mean(expected))


def test_in_a_slice_of_items_only_their_positives_count(judged: JudgedLists) -> None:
    slices = {s.name: s for s in compared(judged).slices}
    head = slices["item_popularity = head"]
    # a's item 1 is first, c's item 3 too; a's cold positive does not count here.
    assert head.num_users == 2
    assert head.metric(R2).value == 1  # type: ignore[union-attr]
    assert slices["item_popularity = tail"].metric(R2).value == 0  # type: ignore[union-attr]
    cold = slices["item_popularity = cold"].metric("retrieval/cold_item_recall_at_2")
    assert cold is not None and cold.value == 1


def test_what_is_not_defined_is_said_not_shown_as_a_number(judged: JudgedLists) -> None:
    head = next(s for s in compared(judged).slices if s.name == "item_popularity = head")
    cold = head.metric("retrieval/cold_item_recall_at_2")
    assert cold is not None
    assert (cold.value, cold.low, cold.count) == (None, None, 0)
    assert cold.note == "no user with a positive that training did not meet"
    assert cold.against["popularity"].difference is None
    recall = head.metric(R2)
    assert recall is not None
    assert (recall.low, recall.note) == (None, "2 users, of 10 that an interval takes")
    assert head.note == "2 users are too few to tell"


def many(num_users: int = 200) -> JudgedLists:
    """The candidate finds everybody's item, but for the users of surface b, whose change is for the worse."""
    on_b = np.arange(num_users) % 4 == 0
    positives = pl.DataFrame(
        {
            "user": np.arange(num_users),
            "item": np.full(num_users, 1),
            "is_cold": np.zeros(num_users, bool),
            "surface": np.where(on_b, "b", "a"),
        }
    )
    found, lost = [1, 2], [2, 3]
    return JudgedLists(
        [f"u{n}" for n in range(num_users)],
        positives,
        {
            "candidate": np.array([lost if b else found for b in on_b]),
            "last_blessed": np.array([found if b else lost for b in on_b]),
        },
    )


def test_slices_that_fell_most_against_the_last_blessed_model_come_first() -> None:
    result = compare_retrieval(many(), (2,), [("surface",)], {}, {}, SETTINGS)
    assert [s.name for s in result.slices] == ["", "surface = b", "surface = a"]
    worst = result.slices[1].metric(R2)
    assert worst is not None
    assert worst.against["last_blessed"].difference == -1
    assert worst.against["last_blessed"].p_value == pytest.approx(2 / 201)
    whole = result.whole.metric(R2)
    assert whole is not None and whole.value == 0.75
    assert whole.low is not None and whole.high is not None and whole.low < 0.75 < whole.high


def test_tables_hold_what_the_numbers_come_from(judged: JudgedLists) -> None:
    table = positives_table(judged, ITEMS)
    assert table.columns[:3] == ["user_id", "item_id", "is_cold"]
    assert table["candidate"].to_list() == [1, 2, 3, 1]
    assert table["popularity"].to_list() == [0, 0, 0, 0]
    recall = table.group_by("user_id").agg((pl.col("candidate").is_between(1, 2)).mean())
    assert recall["candidate"].mean() == pytest.approx(compared(judged).whole.metric(R2).value)  # type: ignore[union-attr]
    assert lists_table(judged, ITEMS).filter(user_id="c")["candidate"].to_list() == [["i3", "i5"]]


def test_lists_are_measured_by_themselves_and_what_the_catalogue_lacks_is_left_out(
    judged: JudgedLists,
) -> None:
    facts = CatalogueFacts(
        num_choosers=np.array([7, 3, 1, 0, 0, 0]),
        num_users=7,
        attributes=np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [0, 0]], bool),
    )
    # Item 7 of the candidate's first list is not among these six.
    whole = compared(dataclasses.replace(judged, catalogue=facts)).whole
    values = {metric.key.rpartition("/")[2]: metric for metric in whole.metrics}
    # The first two of each user: 1 and an unknown; 0 and 4; 3 and 5.
    assert values["mean_popularity_at_2"].value == pytest.approx((3 + 3.5 + 0) / 3)
    assert values["novelty_at_2"].value == pytest.approx((1 + 1.5 + 3) / 3)
    assert values["coverage_at_2"].value == pytest.approx(5 / 6)
    # 0 and 4 share one of two attributes, 3 and 5 nothing; one item is no pair.
    assert values["intra_list_diversity_at_2"].value == pytest.approx((0.5 + 1) / 2)
    assert "mean_age_days_at_2" not in values
    popularity = values["coverage_at_2"].against["popularity"]
    assert (popularity.value, popularity.low) == (pytest.approx(2 / 6), None)


def test_every_metric_that_is_measured_can_be_gated(judged: JudgedLists) -> None:
    everything = CatalogueFacts(np.arange(8), 8, np.zeros(8), np.eye(8, 3, dtype=bool))
    whole = compared(dataclasses.replace(judged, catalogue=everything)).whole
    assert {metric.key for metric in whole.metrics} == set(metric_keys((2, 3)))
