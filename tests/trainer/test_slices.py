"""Which rows belong together when a model is judged."""

import doctest

import numpy as np
import polars as pl
import pytest

from schema.errors import ConfigError
from tests.trainer.ranking_tables import SPEC
from trainer import slices
from trainer.slices import (
    activity_deciles,
    as_text,
    dimensions,
    popularity_masks,
    popularity_segments,
    slices_of,
)


def test_the_examples_of_the_documentation_hold() -> None:
    assert doctest.testmod(slices).failed == 0


def test_equally_active_users_share_a_decile_and_a_hundred_make_ten_of_each() -> None:
    deciles = activity_deciles(np.arange(1, 101))
    assert {decile: deciles.count(decile) for decile in deciles} == {str(n): 10 for n in range(1, 11)}
    assert activity_deciles([7, 7, 7]) == ["6", "6", "6"]
    assert activity_deciles([0, 0]) == ["new", "new"]


def test_head_torso_and_tail_are_a_tenth_four_tenths_and_the_rest_of_the_known_items() -> None:
    segments = popularity_segments(np.arange(20, 0, -1), np.array([True] * 10 + [False] * 10))
    assert segments == ["head"] + ["torso"] * 4 + ["tail"] * 5 + ["cold"] * 10


def test_masks_of_the_segments_hold_each_item_once() -> None:
    popularity = np.array([5.0, 0, 9, 1, 1, 1, 1, 1, 1, 1, 99])
    masks = popularity_masks(popularity, np.array([True] * 10 + [False]))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()} == {
        "head": [2], "torso": [0, 3, 4, 5], "tail": [1, 6, 7, 8, 9], "cold": [10],
    }  # fmt: skip


def test_numbers_are_cut_into_quarters_named_by_their_bounds() -> None:
    ages = pl.Series("age", [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, None, float("nan")])
    assert as_text(ages).to_list() == [
        *["10 to 30"] * 3,
        *["30 to 50"] * 2,
        *["50 to 70"] * 2,
        *["70 to 90"] * 2,
        "(missing)",
        "(missing)",
    ]


def test_a_number_of_few_values_keeps_them() -> None:
    assert as_text(pl.Series("level", [2, 1, None, 2])).to_list() == ["2", "1", "(missing)", "2"]


def test_rare_values_are_one_slice_together() -> None:
    values = [f"common-{n % 19}" for n in range(190)] + [f"rare-{n}" for n in range(30)]
    text = as_text(pl.Series("country", values))
    assert text.n_unique() == 20
    assert (text == "(other)").sum() == 30


def test_slices_are_all_rows_then_values_and_crosses_that_occur() -> None:
    rows = pl.DataFrame({"surface": ["a", "b", "a"], "country": ["de", "de", "fr"]})
    found = {s.key: s.mask.tolist() for s in slices_of(rows, [("surface",), ("surface", "country")])}
    assert list(found.items()) == [
        ((), [True, True, True]),
        ((("surface", "a"),), [True, False, True]),
        ((("surface", "b"),), [False, True, False]),
        ((("surface", "a"), ("country", "de")), [True, False, False]),
        ((("surface", "a"), ("country", "fr")), [False, False, True]),
        ((("surface", "b"), ("country", "de")), [False, True, False]),
    ]


def test_built_in_dimensions_and_the_surface_always_come_and_declared_ones_once() -> None:
    assert dimensions(SPEC, [("country",), ("surface",), ("surface", "activity_decile")]) == (
        ("user_type",),
        ("activity_decile",),
        ("item_popularity",),
        ("surface",),
        ("country",),
        ("surface", "activity_decile"),
    )


def test_a_feature_of_several_values_is_no_dimension() -> None:
    with pytest.raises(ConfigError, match="'tag' is no dimension of tiny; those are: user_type"):
        dimensions(SPEC, [("tag",)])
