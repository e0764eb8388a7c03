"""How far data moved, by TFDV."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow_data_validation as tfdv
from tfx.types.standard_artifacts import ExampleStatistics, Schema

from schema.errors import DataError
from tests.trainer.ranking_tables import SPEC
from tfx_pipeline.components.drift_validator import Drift, DriftValidator
from tfx_pipeline.config import BUNDLES, DriftConfig, load_run_config
from tfx_pipeline.drift import compared_features, drift, read_drift, write_drift
from tfx_pipeline.drift_facts import DriftFacts, FeatureDrift
from tfx_pipeline.pipeline import PipelineLocations, create_pipeline


def frame(share_of_de: float, clicks: float) -> pd.DataFrame:
    """A thousand rows; what the share is not about stays the same."""
    size = 1_000
    return pd.DataFrame(
        {
            "country": np.where(np.arange(size) < share_of_de * size, "de", "in"),
            "surface": np.where(np.arange(size) % 2, "0", "1"),
            "friends": np.linspace(0, 1, size),
            "click": (np.arange(size) % 100 < 100 * clicks).astype(float),
        }
    )


def compare(left: pd.DataFrame, right: pd.DataFrame, config: DriftConfig) -> DriftFacts:
    statistics = [tfdv.generate_statistics_from_dataframe(table) for table in (left, right)]
    schema = tfdv.infer_schema(statistics[0])
    others = {"train_to_eval": statistics[1], "last_run": statistics[0]}
    return drift(statistics[0], others, schema, SPEC, config, {})[0]


def test_a_share_that_moved_is_told_with_its_distance_and_the_rest_is_near() -> None:
    found = compare(frame(0.6, 0.4), frame(0.3, 0.4), DriftConfig(max_share_change=0.1)).found
    first, *rest = found["train_to_eval"]
    assert (first.feature, first.limit, first.is_too_far) == ("country", 0.1, True)
    assert first.distance == pytest.approx(0.3)
    assert not any(feature.is_too_far for feature in (*rest, *found["last_run"]))
    assert {feature.feature for feature in found["last_run"]} == {"country", "surface", "friends", "click"}


def test_a_label_that_moved_is_told() -> None:
    found = compare(frame(0.6, 0.4), frame(0.6, 0.9), DriftConfig(max_divergence=0.1)).found
    assert [f.feature for f in found["train_to_eval"] if f.is_too_far] == ["click"]


def test_ignored_features_and_those_of_several_values_are_not_compared() -> None:
    config = DriftConfig(ignored=("country", "duration_s"))
    assert compared_features(SPEC, config) == {
        "friends": False, "surface": True, "click": False, "watch_time_s": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("distance", "is_too_far"), [(0.1, False), (0.11, True), (None, True), (float("nan"), True)]
)
def test_a_distance_that_nobody_can_tell_is_too_far(distance: float | None, is_too_far: bool) -> None:
    assert FeatureDrift("country", distance, 0.1).is_too_far is is_too_far


def test_without_limits_nothing_is_compared_and_the_facts_say_so(tmp_path: Path) -> None:
    facts, statistics, schema = Drift(), ExampleStatistics(), Schema()
    facts.uri = str(tmp_path / "drift")
    # Neither statistics nor schema are there to be read.
    DriftValidator.EXECUTOR_SPEC.executor_class().Do(
        {"statistics": [statistics], "schema": [schema], "last_statistics": []},
        {"drift_facts": [facts]},
        {"dataset": SPEC.model_dump_json(), "config": "", "code_version": ""},
    )
    assert read_drift(tmp_path / "drift") == DriftFacts(
        {}, {"train_to_eval": "switched off", "last_run": "switched off"}
    )


def test_the_setting_that_switches_drift_off_reaches_the_component() -> None:
    for overrides, limits in (((), DriftConfig().model_dump_json()), (("validation.drift=null",), "")):
        locations = PipelineLocations("t", 0, "p", "s", "v", dict.fromkeys(BUNDLES, ""))
        pipeline = create_pipeline(load_run_config("simulated", overrides), locations)
        (node,) = [node for node in pipeline.components if node.id == "DriftValidator"]
        assert node.exec_properties["config"] == limits


def test_drift_survives_its_file(tmp_path: Path) -> None:
    measured = (FeatureDrift("age", None, 0.1), FeatureDrift("country", 0.3, 0.1))
    facts = DriftFacts({"train_to_eval": measured}, {"last_run": "no run"})
    write_drift(facts, {}, tmp_path / "new")
    assert read_drift(tmp_path / "new") == facts
    with pytest.raises(DataError, match=f"there is no {tmp_path}"):
        read_drift(tmp_path)
