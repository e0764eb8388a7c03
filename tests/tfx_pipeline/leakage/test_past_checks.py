"""Honest examples pass; each way to let an example know too much is found."""

import dataclasses
from collections.abc import Callable

import polars as pl
import pytest

from schema.contract import DatasetSpec, SplitSpec
from tests.tfx_pipeline.leakage.leaky_world import SPEC, World
from tfx_pipeline.examples import ExampleSettings, interaction_columns
from tfx_pipeline.leakage.past_checks import (
    check_recomputed,
    check_splits,
    check_states,
    check_strictly_before,
)
from tfx_pipeline.leakage.recorded import KEY
from trainer import features as ft

Mutation = Callable[[pl.DataFrame], pl.DataFrame]


def test_honest_examples_pass_every_check(world: World) -> None:
    past = world.past()
    for check in (
        check_recomputed(world.samples, past),
        check_states(world.user_states, world.catalogue, past),
        check_strictly_before(world.samples, past, SPEC),
        check_splits(keys(world), world.interactions, SPEC),
    ):
        assert check.passed, check


def own_item_in_history(sample: pl.DataFrame) -> pl.DataFrame:
    return sample.with_columns(pl.concat_list(ft.HISTORY, ft.ITEM_ID).alias(ft.HISTORY))


def own_impression(sample: pl.DataFrame) -> pl.DataFrame:
    own = {
        ft.IMPRESSION_ITEMS: ft.ITEM_ID,
        ft.IMPRESSION_TIMES: ft.EVENT_TIME,
        ft.IMPRESSION_SURFACES: ft.SURFACE,
        **{ft.impression_label(label): label for label in SPEC.task_labels},
    }
    return sample.with_columns(pl.concat_list(name, of).alias(name) for name, of in own.items())


def own_click_counted(sample: pl.DataFrame) -> pl.DataFrame:
    # The first number is the impressions of the whole log: one more, as a count up to the event would have.
    counts = [[first + 1, *rest] for first, *rest in sample[ft.ITEM_COUNTS]]
    return sample.with_columns(pl.Series(ft.ITEM_COUNTS, counts, pl.List(pl.Float32)))


def later_country(sample: pl.DataFrame) -> pl.DataFrame:
    return sample.with_columns(pl.lit(["it"]).alias("country"))


def reversed_history(sample: pl.DataFrame) -> pl.DataFrame:
    return sample.with_columns(pl.col(ft.HISTORY).list.reverse())


def every_row_weighs(sample: pl.DataFrame) -> pl.DataFrame:
    return sample.with_columns(pl.lit([1.0], pl.List(pl.Float32)).alias(ft.RETRIEVAL_WEIGHT))


def session_so_far(sample: pl.DataFrame) -> pl.DataFrame:
    return sample.with_columns(pl.col(ft.HISTORY).alias(ft.PRIOR_SESSIONS))


def other_search(sample: pl.DataFrame) -> pl.DataFrame:
    return sample.with_columns(pl.lit(["cats"]).alias(ft.SEARCH_TOKENS))


@pytest.mark.parametrize(
    ("plant", "feature"),
    [
        (own_item_in_history, ft.HISTORY),
        (own_impression, ft.IMPRESSION_ITEMS),
        (own_click_counted, ft.ITEM_COUNTS),
        (later_country, "country"),
        (reversed_history, ft.HISTORY),
        (every_row_weighs, ft.RETRIEVAL_WEIGHT),
        (session_so_far, ft.PRIOR_SESSIONS),
        (other_search, ft.SEARCH_TOKENS),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_feature_that_differs_from_what_was_known_is_found(
    world: World, plant: Mutation, feature: str
) -> None:
    check = check_recomputed({"train": plant(world.samples["train"].head(40))}, world.past())
    assert not check.passed
    assert feature in check.findings[0]


def test_examples_that_join_the_latest_attributes_are_found(world: World) -> None:
    newest = world.users.unique("user_id", keep="last").drop("valid_from_unix_s")
    rows = interaction_columns(
        world.interactions, newest, world.items, SPEC, ExampleSettings(world.train_end_unix_s, 12)
    )
    country = rows.filter(pl.col("split") == "train")["country"]
    sample = world.samples["train"].with_columns(
        pl.Series("country", [[value] if value else [] for value in country], pl.List(pl.String))
    )
    assert not check_recomputed({"train": sample}, world.past()).passed


@pytest.mark.parametrize(
    ("plant", "what"), [(own_item_in_history, "history"), (own_impression, "impressions")]
)
def test_a_past_that_holds_the_event_itself_is_told_as_such(world: World, plant: Mutation, what: str) -> None:
    sample = plant(world.samples["test"].filter(pl.col("click").list.first() > 0))
    check = check_strictly_before({"test": sample}, world.past(), SPEC)
    assert not check.passed
    assert what in check.findings[0]


def test_user_states_that_hold_what_was_held_out_are_found(world: World) -> None:
    states = world.user_states.with_columns(
        pl.concat_list(ft.HISTORY, ft.TEST_ITEMS).list.tail(SPEC.max_history).alias(ft.HISTORY)
    )
    check = check_states(states, world.catalogue, world.past())
    assert not check.passed
    assert "user state" in check.findings[0] and ft.HISTORY in check.findings[0]


def test_catalogue_counts_of_the_whole_log_are_found(world: World) -> None:
    catalogue = world.catalogue.with_columns(
        pl.col(ft.ITEM_COUNTS).list.eval(pl.element() + 1.0).cast(pl.List(pl.Float32))
    )
    check = check_states(world.user_states.head(0), catalogue, world.past())
    assert not check.passed
    assert ft.ITEM_COUNTS in check.findings[0]


def keys(world: World) -> dict[str, pl.DataFrame]:
    return {
        split: sample.select(pl.col(name).list.first() for name in KEY)
        for split, sample in world.samples.items()
    }


def test_a_test_row_among_the_train_examples_is_found(world: World) -> None:
    found = keys(world)
    found["train"] = pl.concat([found["train"], found["test"].head(1)])
    check = check_splits(found, world.interactions, SPEC)
    assert not check.passed
    assert any("more than one split" in finding for finding in check.findings)
    assert any("not later" in finding for finding in check.findings)
    assert any("not the" in finding for finding in check.findings)


def test_splits_may_meet_in_a_second_only_where_rows_are_cut_by_number(world: World) -> None:
    found = keys(world)
    start = found["eval"][ft.EVENT_TIME].min()
    is_last = pl.int_range(pl.len()) == pl.len() - 1
    found["train"] = found["train"].with_columns(
        pl.when(is_last).then(pl.lit(start)).otherwise(ft.EVENT_TIME).alias(ft.EVENT_TIME)
    )
    cut_by_time = SplitSpec.model_validate(
        {"train_until": "2023-11-20T00:00:00Z", "eval_until": "2023-11-22T00:00:00Z"}
    )
    for spec, is_allowed in ((SPEC, True), (with_split(cut_by_time), False)):
        findings = check_splits(found, world.interactions, spec).findings
        assert any("not later" in finding for finding in findings) != is_allowed


def with_split(split: SplitSpec) -> DatasetSpec:
    return SPEC.model_copy(update={"split": split})


def test_an_example_of_no_interaction_is_found(world: World) -> None:
    sample = world.samples["train"].head(1).with_columns(pl.lit([1], pl.List(pl.Int64)).alias(ft.EVENT_TIME))
    check = check_recomputed({"train": sample}, world.past())
    assert "no interaction" in check.findings[0]


def test_many_findings_are_counted(world: World) -> None:
    check = check_recomputed({"train": later_country(world.samples["train"])}, world.past())
    assert len(check.findings) == 6
    assert "more" in check.findings[-1]
    assert dataclasses.asdict(check)["passed"] is False
