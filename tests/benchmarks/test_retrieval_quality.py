import types

import numpy as np
import polars as pl
import pytest

from benchmarks import comparison, protocols, retrieval_quality
from benchmarks.baselines import Baseline, same_for_all
from benchmarks.comparison import USER_METRICS, Judged
from benchmarks.protocols import global_temporal
from benchmarks.retraining import lists_of, retrained
from benchmarks.retrieval_quality import (
    OURS,
    compare,
    content_popularity,
    exported_lists,
    to_markdown,
    tune,
)
from schema.errors import DataError
from tests.benchmarks.tiny_tables import ITEMS, split_tables


def test_tuning_takes_what_finds_the_validation_items_and_fits_every_seed(monkeypatch):
    monkeypatch.setattr(comparison, "LIST_LENGTH", 3)
    monkeypatch.setattr(
        retrieval_quality, "judge", lambda ranked, positives: {"ndcg_at_100": ranked[:, 0] == positives[0][0]}
    )
    fits = []

    def fit(protocol, seed, parameters):
        fits.append((seed, parameters["best"]))
        return same_for_all(np.eye(5)[parameters["best"]])

    # The only validation user chose item 2.
    fitted = tune(
        Baseline(fit, {"best": (4, 2, 3)}, seeded=True), global_temporal(split_tables()), 3, lambda: None
    )
    assert fitted.parameters == {"best": 2}
    assert fits == [(0, 4), (0, 2), (0, 3), (1, 2), (2, 2)]
    assert len(fitted.models) == 3


def test_content_popularity_is_the_mean_over_categories_of_warm_items():
    data = split_tables()
    # Training positives: a 2, b 2, c 1. Genres: a x; b x, y; c y; d none; e x, z. d and e are cold.
    # x: mean(2, 2) = 2; y: mean(2, 1) = 1.5; z: nobody warm.
    values = content_popularity(data, global_temporal(data))
    assert values.tolist() == [2.0, 1.75, 1.5, 0.0, 2.0]


@pytest.fixture
def fake_run(monkeypatch):
    """A finished run whose model answers what the returned list is filled with: (user, rank, item)."""
    answers = []
    run = types.SimpleNamespace(
        dataset="movielens-1m", config=types.SimpleNamespace(dataset=split_tables().spec)
    )

    def recommend(run, paths, user_ids, k, include_seen, out, on_progress):
        assert not include_seen
        pl.DataFrame(answers, schema=["user_id", "rank", "item_id"], orient="row").write_parquet(out)

    monkeypatch.setattr(protocols, "read_run", lambda folder: run)
    monkeypatch.setattr(retrieval_quality, "batch_recommend", recommend)
    return types.SimpleNamespace(run=run, answers=answers)


def test_answers_of_the_export_become_item_codes_in_rank_order(fake_run, tmp_path):
    fake_run.answers += [("w", 2, "a"), ("w", 1, "e"), ("u", 1, "c")]
    lists = exported_lists(tmp_path, split_tables(), ["u", "w"], lambda done: None)
    assert lists.shape == (2, comparison.LIST_LENGTH)
    assert lists[:, :3].tolist() == [[2, -1, -1], [4, 0, -1]]


def test_a_run_of_another_dataset_is_refused(fake_run, tmp_path):
    spec = fake_run.run.config.dataset
    fake_run.run.config.dataset = spec.model_copy(update={"utc_offset_hours": 3.0})
    with pytest.raises(DataError, match="declaration differs"):
        exported_lists(tmp_path, split_tables(), ["u"], lambda done: None)
    with pytest.raises(DataError, match="declaration differs"):
        lists_of(tmp_path / "model", tmp_path, split_tables(), ["u"])
    with pytest.raises(DataError, match="declaration differs"), retrained(tmp_path, split_tables(), {}):
        pass


def test_an_item_outside_the_catalogue_is_refused(fake_run, tmp_path):
    fake_run.answers.append(("u", 1, "stranger"))
    with pytest.raises(DataError, match="'stranger'"):
        exported_lists(tmp_path, split_tables(), ["u"], lambda done: None)


def judged(value):
    """Two seeds and four users whose mean is `value`."""
    by_user = np.tile(value * np.array([0.9, 1.1, 0.8, 1.2]), (2, 1))
    return Judged(dict.fromkeys(USER_METRICS, by_user), np.array([0.1, 0.3]))


def test_ours_is_compared_with_every_other_model():
    figures = compare({"popularity": judged(0.25), "iALS": judged(0.5), OURS: judged(0.75)})
    assert figures["models"]["iALS"]["recall_at_10"]["mean"] == pytest.approx(0.5)
    differences = {name: d["recall_at_10"]["difference"] for name, d in figures["ours_minus"].items()}
    assert differences == pytest.approx({"popularity": 0.5, "iALS": 0.25})


def test_baselines_alone_are_not_compared():
    assert "ours_minus" not in compare({"popularity": judged(0.25)})


def test_report_names_every_model_its_parameters_and_differences():
    part = compare({"popularity": judged(0.25), OURS: judged(0.75)})
    slices = ("all", "cold_items", "cold_users")
    report = to_markdown(
        {
            "dataset": "movielens-1m",
            "train_positives": 1000,
            "candidates": len(ITEMS),
            "users": dict.fromkeys((*slices, "validation"), 4),
            "seeds": {"popularity": 1, OURS: 2},
            "tuned_for": "ndcg_at_100",
            "parameters": {"popularity": {"window_days": 7.0}},
            "validation": part["models"],
            "test": dict.fromkeys(slices, part),
        }
    )
    assert "| popularity | 1 | window_days 7 |" in report
    assert "| popularity | 0.2500 ± 0.0000 |" in report
    assert "| popularity | +0.5000 [" in report
    assert report.count("## ") == 4
