"""Variants of the ranker: each changes what it says it does, on the same rows."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.ranking_ablation import (
    BASE,
    VARIANTS,
    Variant,
    _no_powers,
    _some_rows,
    _without,
    to_markdown,
)
from schema.contract import load_dataset_spec
from schema.errors import ConfigError
from tests.trainer import ranking_world as world
from tfx_pipeline.retraining import merged
from trainer import features as ft
from trainer.config import RankingConfig
from trainer.encoder import EmbeddingTables, FeatureEncoder
from trainer.label_statistics import label_statistics
from trainer.ranking import RankingModel

WINDOW = {"ids": tf.constant([[3, 2], [4, 0]]), "counters": tf.constant([[0.5], [0.25]])}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_settings_of_the_ranker(name: str) -> None:
    base = RankingConfig(crosses=(("surface", "tag"),), ignored_features=("user_id",)).model_dump()
    config = RankingConfig.model_validate(merged(base, VARIANTS[name].overrides))
    is_default = name == "DCN-v2 full, parallel" or not VARIANTS[name].overrides
    assert (config.model_dump() == base) == is_default


def test_every_variant_but_the_base_changes_something_of_kuairand() -> None:
    spec = load_dataset_spec("kuairand-pure")
    same = [
        name
        for name, variant in VARIANTS.items()
        if not variant.overrides and variant.has_powers
        if not variant.hides(spec) and variant.learns(spec) == spec
    ]
    assert same == [BASE]


def test_features_of_users_are_hidden_under_their_transformed_names() -> None:
    assert VARIANTS["without features of users"].hides(world.spec()) == ("age_cdf", "age_bucket")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant(hidden=("hour_id",)), "no feature 'hour_id'"),
        (Variant(hides_user_features=True), "no features of users"),
        (Variant(only_task="share"), "no task 'share'"),
    ],
    ids=["feature", "users", "task"],
)
def test_what_the_dataset_does_not_have_cannot_be_taken_away(variant: Variant, message: str) -> None:
    spec = world.spec(users={"files": ["users.csv"], "columns": {"user_id": "user_id"}, "features": []})
    with pytest.raises(ConfigError, match=message):
        variant.hides(spec)
        variant.learns(spec)


def test_one_task_alone_has_the_loss_of_that_task_and_features_of_all() -> None:
    spec = Variant(only_task="click").learns(world.spec())
    rows = world.rows(64, seed=3)
    statistics = label_statistics([rows], spec.tasks)
    config = RankingConfig(experts={"hidden_layers": (4,)}, max_embedding_width=4)
    model = RankingModel(spec, world.VOCABULARY_SIZES, statistics, world.attributes(spec), config)
    # Untrained, it says the share of clicks of every row.
    share = rows["click"].mean()
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert model.compute_loss(rows).numpy() == pytest.approx(entropy, rel=1e-5)
    assert ft.impression_names(spec) == ft.impression_names(world.spec())


def test_without_powers_a_continuous_feature_is_read_as_it_is() -> None:
    age = ft.feature_space(world.spec()).find("age")
    encoder = FeatureEncoder([age], EmbeddingTables({}, {}), bucket_width=4)
    row = {"age_cdf": tf.constant([0.25]), "age_bucket": tf.constant([9])}
    with _no_powers():
        alone = encoder(row)
    # x, x² and √x of .25, before the bucket's embedding.
    np.testing.assert_allclose(encoder(row)[:, :3], [[0.25, 0.0625, 0.5]])
    np.testing.assert_array_equal(alone[:, :1], [[0.25]])
    assert alone.shape[-1] == 1 + 4


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


def test_table_leaves_out_the_tasks_that_a_variant_does_not_learn() -> None:
    results = {
        BASE: {"cpu_s": 30.2, "epochs": 3.0, "click/auc": 0.75, "like/auc": 0.85},
        "like alone": {"cpu_s": 20.0, "epochs": 2.0, "like/auc": 0.84},
    }
    assert to_markdown(results).splitlines()[-1] == "| like alone | 20 | 2 |  | 0.8400 (-0.0100) |"
