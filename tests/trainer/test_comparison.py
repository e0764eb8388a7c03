"""The facts of a comparison and their JSON form."""

import json
from pathlib import Path

import pytest

from schema.errors import DataError
from trainer.comparison import (
    COMPARISON_FILE,
    Against,
    Comparison,
    MetricResult,
    Rival,
    SliceResult,
    read_comparison,
    slice_name,
    write_comparison,
)


def comparison() -> Comparison:
    recall = "retrieval/recall_at_100"
    against = {"popularity": Against(0.2, 0.1, 0.05, 0.15, 0.001)}
    undefined = {"popularity": Against(None, None, None, None, None)}
    return Comparison(
        model="retrieval",
        headline=recall,
        confidence=0.95,
        num_resamples=1_000,
        rivals=(Rival("popularity", ""),),
        absent={"last_blessed": "no model was blessed yet"},
        slices=(
            SliceResult((), 100, 100, "", (MetricResult(recall, 100, 0.3, 0.25, 0.35, "", against),)),
            SliceResult(
                (("surface", "home"), ("user_type", "cold")),
                3,
                3,
                "3 users are too few to tell",
                (MetricResult(recall, 0, None, None, None, "no user with a positive", undefined),),
            ),
        ),
        facts={"click_prediction_std": None},
    )


def test_a_comparison_survives_its_file(tmp_path: Path) -> None:
    write_comparison(comparison(), tmp_path / "new")
    assert read_comparison(tmp_path / "new") == comparison()
    # What is not defined is null, which every reader of JSON knows; NaN is none.
    assert "NaN" not in (tmp_path / "new" / COMPARISON_FILE).read_text()


def test_the_whole_split_comes_first_and_slices_have_names() -> None:
    assert comparison().whole.name == ""
    assert comparison().slices[1].name == "surface = home, user_type = cold"
    assert slice_name(()) == ""
    assert comparison().whole.metric("retrieval/recall_at_100") is not None
    assert comparison().whole.metric("retrieval/recall_at_7") is None


def test_a_folder_without_a_comparison_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no {tmp_path}"):
        read_comparison(tmp_path)


def test_a_comparison_of_another_form_is_refused_by_field(tmp_path: Path) -> None:
    write_comparison(comparison(), tmp_path)
    values = json.loads((tmp_path / COMPARISON_FILE).read_text())
    values["slices"][0]["num_users"] = "many"
    (tmp_path / COMPARISON_FILE).write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"slices\.0\.num_users"):
        read_comparison(tmp_path)
