"""Which single features give a label away."""

import numpy as np
import polars as pl
import pytest

from tests.tfx_pipeline.leakage.leaky_world import SPEC, World
from tfx_pipeline.leakage.associations import check_associations, target_encoding
from tfx_pipeline.leakage.findings import Association
from trainer import features as ft


def found(train: pl.DataFrame, evaluation: pl.DataFrame, task: str, feature: str) -> Association:
    associations = check_associations(train, evaluation, SPEC)[1]
    return next(a for a in associations if (a.task, a.feature) == (task, feature))


def test_honest_features_pass(world: World) -> None:
    check, associations = check_associations(world.samples["train"], world.samples["eval"], SPEC)
    assert check.passed, check
    assert {a.task for a in associations} == {"click", "watch_time"}
    assert [a.auc for a in associations] == sorted((a.auc for a in associations), reverse=True)


def from_click(sample: pl.DataFrame, name: str, of: pl.Expr, dtype: pl.DataType) -> pl.DataFrame:
    return sample.with_columns(pl.concat_list(of).cast(pl.List(dtype)).alias(name))


CLICK = pl.col("click").list.first()


@pytest.mark.parametrize(
    ("feature", "of", "dtype"),
    [
        ("activity", CLICK * 3 + 1, pl.Float32()),
        ("activity", (CLICK - 0.5).abs() * 0 + pl.when(CLICK > 0).then(None).otherwise(1.0), pl.Float32()),
        ("country", pl.when(CLICK > 0).then(pl.lit("it")).otherwise(pl.lit("de")), pl.String()),
        ("tags", pl.when(CLICK > 0).then(pl.lit("a")).otherwise(pl.lit("b")), pl.String()),
    ],
    ids=["a number", "a missing number", "a category", "a list"],
)
def test_a_feature_made_of_the_label_is_found(
    world: World, feature: str, of: pl.Expr, dtype: pl.DataType
) -> None:
    leaky = [from_click(world.samples[split], feature, of, dtype) for split in ("train", "eval")]
    leaky = [s.with_columns(pl.col(feature).list.drop_nulls()) for s in leaky]
    check, _ = check_associations(*leaky, SPEC)
    assert not check.passed
    assert any(line.startswith(f"{feature} alone orders click") for line in check.findings)
    assert found(*leaky, "click", feature).auc == 1.0


def test_a_history_that_holds_the_clicked_item_is_found(world: World) -> None:
    leaky = [
        s.with_columns(
            pl.when(CLICK > 0)
            .then(pl.concat_list(ft.HISTORY, ft.ITEM_ID))
            .otherwise(ft.HISTORY)
            .alias(ft.HISTORY)
        )
        for s in (world.samples["train"], world.samples["eval"])
    ]
    check, _ = check_associations(*leaky, SPEC, max_auc=0.8)
    assert any(f"item in {ft.HISTORY}" in line for line in check.findings)


def test_an_id_that_only_eval_has_says_nothing(world: World) -> None:
    """A target encoding that was fitted on the rows that it judges would give 1."""
    train, evaluation = world.samples["train"], world.samples["eval"]
    unique = [
        s.with_columns(pl.Series("country", [[f"{side}{row}"] for row in range(len(s))]))
        for side, s in (("t", train), ("e", evaluation))
    ]
    assert found(*unique, "click", "country").auc == 0.5


def test_the_encoding_is_the_smoothed_train_mean() -> None:
    """By hand: prior 1/2; a (20 * .5 + 3) / (20 + 4) = 13/24, b (10 + 1) / (20 + 4) = 11/24, unknown 1/2."""
    train = pl.Series(["a", "a", "a", "a", "b", "b", "b", "b"])
    labels = pl.Series([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    encoded = target_encoding(train, pl.Series(["b", "a", "c"]), labels)
    np.testing.assert_allclose(encoded, [11 / 24, 13 / 24, 0.5])
    as_lists = pl.Series([[value] for value in train])
    lists = target_encoding(as_lists, pl.Series([["a", "b"], [], ["a"]]), labels)
    np.testing.assert_allclose(lists, [0.5, 0.5, 13 / 24])


def test_a_label_with_a_handful_of_positives_is_not_judged(world: World) -> None:
    few = world.samples["eval"].with_columns(
        pl.when(pl.int_range(pl.len()) < 5)
        .then(pl.lit([1.0]))
        .otherwise(pl.lit([0.0]))
        .cast(pl.List(pl.Float32))
        .alias("click")
    )
    check, associations = check_associations(world.samples["train"], few, SPEC)
    assert "too few rows of a class to judge click" in check.detail
    assert {a.task for a in associations} == {"watch_time"}
