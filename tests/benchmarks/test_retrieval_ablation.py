"""Variants of the retrieval model: each changes what it says, on the datasets that have what it is about."""

import dataclasses

import polars as pl
import pytest

from benchmarks.protocols import Tables
from benchmarks.retrieval_ablation import BASE, VARIANTS, Variant, to_markdown
from tfx_pipeline.config import RunConfig, load_run_config
from tfx_pipeline.retraining import merged
from trainer.config import RetrievalConfig

SURFACES = {"movielens-1m": [], "kuairand-pure": ["0", "1"], "simulated": ["home", "search"]}
WITHOUT_SURFACES = {"watches of tab 1 only", "watches of the home screen only"}
WITHOUT_PLACES = {"no search words", "no geography", "no device"}


def world(dataset: str) -> tuple[RunConfig, Tables]:
    config = load_run_config(dataset)
    surfaces = SURFACES[dataset]
    interactions = pl.DataFrame({"surface": surfaces} if surfaces else {"user_id": ["u"]})
    return config, Tables(config.dataset, interactions, pl.DataFrame())


@pytest.fixture(scope="module")
def worlds() -> dict[str, tuple[RunConfig, Tables]]:
    return {dataset: world(dataset) for dataset in SURFACES}


@pytest.mark.parametrize("dataset", SURFACES)
def test_every_variant_is_a_valid_run_that_differs_in_what_it_names_alone(dataset: str) -> None:
    config, tables = world(dataset)
    before = config.retrieval.model_dump()
    for name, variant in VARIANTS.items():
        if not variant.applies_to(tables):
            continue
        settings = merged(before, variant.settings(tables, config.retrieval))
        # The run is refused if the towers cannot do without a feature.
        after = RunConfig.model_validate(config.model_dump() | {"retrieval": settings}).retrieval
        assert set(after.ignored_features) >= set(config.retrieval.ignored_features), name
        changed = {key for key, value in after.model_dump().items() if value != before[key]}
        assert changed <= {*variant.overrides, *(["ignored_features"] if variant.left_out else [])}, name


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_but_the_base_changes_the_default_or_an_official_run(
    name: str, worlds: dict[str, tuple[RunConfig, Tables]]
) -> None:
    runs = [(config.retrieval, tables) for config, tables in worlds.values()]
    runs.append((RetrievalConfig(), worlds["simulated"][1]))
    changes = [
        RetrievalConfig.model_validate(merged(config.model_dump(), VARIANTS[name].settings(tables, config)))
        != config
        for config, tables in runs
        if VARIANTS[name].applies_to(tables)
    ]
    assert any(changes) == (name != BASE)


@pytest.mark.parametrize(
    ("dataset", "skipped"),
    [
        ("movielens-1m", WITHOUT_SURFACES | WITHOUT_PLACES),
        ("kuairand-pure", {"watches of the home screen only", "no demographics"} | WITHOUT_PLACES),
        ("simulated", {"watches of tab 1 only"}),
    ],
)
def test_a_variant_about_what_the_dataset_lacks_is_passed_over(dataset: str, skipped: set[str]) -> None:
    _, tables = world(dataset)
    assert {name for name, variant in VARIANTS.items() if not variant.applies_to(tables)} == skipped


def test_features_are_left_out_beside_those_that_the_run_ignores() -> None:
    _, tables = world("movielens-1m")
    ignoring = RetrievalConfig(ignored_features=("genres",))
    variant = Variant({"seed": 3}, left_out=("gender", "device"))
    assert variant.settings(tables, ignoring) == {"seed": 3, "ignored_features": ("genres", "gender")}
    assert dataclasses.replace(variant, left_out=()).settings(tables, ignoring)["ignored_features"] == (
        "genres",
    )


def test_table_has_the_mean_over_seeds() -> None:
    metrics = ("recall_at_10", "recall_at_100", "ndcg_at_10", "ndcg_at_100", "next_item_hit_rate_at_10")
    results = {BASE: {split: {m: [0.1, 0.3] for m in metrics} for split in ("validation", "test")}}
    header, _, base = to_markdown(results).splitlines()
    assert header.startswith("| variant | validation ") and header.count("test ") == len(metrics)
    assert base == "| as in the run |" + " 0.2000 |" * (2 * len(metrics))
