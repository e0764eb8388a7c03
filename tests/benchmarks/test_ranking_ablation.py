"""Variants of the ranker: each changes what it says it does, on the same rows."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.ranking_ablation import BASE, VARIANTS, _some_rows, _without, to_markdown
from tfx_pipeline.retraining import merged
from trainer.config import RankingConfig

WINDOW = {"ids": tf.constant([[3, 2], [4, 0]]), "counters": tf.constant([[0.5], [0.25]])}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_settings_of_the_ranker(name: str) -> None:
    base = RankingConfig(crosses=(("surface", "tag"),), ignored_features=("user_id",)).model_dump()
    config = RankingConfig.model_validate(merged(base, VARIANTS[name].overrides))
    is_default = name in (BASE, "DCN-v2 full, parallel") or bool(VARIANTS[name].hidden)
    assert (config.model_dump() == base) == is_default


def test_what_is_hidden_is_0_and_the_rest_stays() -> None:
    (seen,) = _without(tf.data.Dataset.from_tensors(WINDOW), ["ids"]).as_numpy_iterator()
    assert not seen["ids"].any()
    np.testing.assert_array_equal(seen["counters"], WINDOW["counters"])


def test_all_variants_are_trained_on_the_same_share_of_the_rows() -> None:
    data = tf.data.Dataset.from_tensors({"x": tf.range(10_000), "ids": tf.zeros([10_000, 2])})
    (kept,), (again,) = (_some_rows(data, 0.4).as_numpy_iterator() for _ in range(2))
    np.testing.assert_array_equal(kept["x"], again["x"])
    # Four standard deviations of a share of 10,000 rows.
    assert len(kept["x"]) == len(kept["ids"]) == pytest.approx(4_000, abs=200)


def test_table_tells_the_difference_to_the_base() -> None:
    results = {
        BASE: {"cpu_s": 30.2, "epochs": 3.0, "click/auc": 0.75, "watch_time/mae": 18.0},
        "MMoE": {"cpu_s": 60.0, "epochs": 2.0, "click/auc": 0.7488, "watch_time/mae": 18.5},
    }
    *_, base, mmoe = to_markdown(results).splitlines()
    assert base == "| as in the run | 30 | 3 | 0.7500 | 18.00 |"
    assert mmoe == "| MMoE | 60 | 2 | 0.7488 (-0.0012) | 18.50 (+0.50) |"
