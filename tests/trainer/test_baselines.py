"""Baselines against hand calculations and the published anchor figures."""

import io
import tarfile
import zipfile

import numpy as np
import polars as pl
import pytest

from schema.contract import TaskKind
from schema.errors import ConfigError, DataError, ShapeError
from trainer import baselines, metrics

DAY = 86_400
NOTHING = np.empty(0, dtype=np.int64)


def test_popular_items_come_first_and_seen_ones_not_at_all():
    scores = np.array([5.0, 9.0, 1.0, 7.0])
    lists = baselines.recommend(scores, [NOTHING, np.array([1, 0]), np.array([3, 3, 99])], k=2)
    assert lists.tolist() == [[1, 3], [3, 2], [1, 0]]


def test_equal_scores_keep_catalogue_order():
    assert baselines.recommend(np.zeros(4), [np.array([1])], k=3).tolist() == [[0, 2, 3]]


def test_user_who_has_seen_nearly_everything_gets_a_short_list_padded_at_the_end():
    assert baselines.recommend(np.array([1.0, 2.0, 3.0]), [np.array([2, 1])], k=3).tolist() == [[0, -1, -1]]


def test_lists_do_not_depend_on_how_users_are_chunked(monkeypatch):
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 9, 40).astype(float)
    seen = [rng.integers(0, 40, rng.integers(0, 40)) for _ in range(50)]
    whole = baselines.recommend(scores, seen, k=10)
    for user, codes in enumerate(seen):
        best = [i for i in sorted(range(40), key=lambda i: (-scores[i], i)) if i not in set(codes.tolist())][
            :10
        ]
        assert whole[user].tolist() == best + [-1] * (10 - len(best))
    monkeypatch.setattr(baselines, "_CELLS_PER_CHUNK", 7 * 40)
    np.testing.assert_array_equal(baselines.recommend(scores, seen, k=10), whole)


def test_recent_popularity_counts_the_window_and_breaks_ties_by_all_of_training():
    # Item 0: 3 old events. Item 1: 1 in the window. Item 2: 1 in the window, 1 old. Item 3: just before it.
    codes = np.array([0, 0, 0, 1, 2, 2, 3])
    times = np.array([0, 1, 2, 95, 0, 100, 93]) * DAY
    scores = baselines.recent_popularity(codes, times, num_items=4, window_days=7)
    assert np.argsort(-scores).tolist() == [2, 1, 0, 3]
    assert scores.astype(int).tolist() == [0, 1, 1, 0]


def test_item_mean_is_pulled_towards_the_global_mean_by_the_prior():
    # Global mean .5; item a: (3 + 2 * .5) / (3 + 2) = .8; item b: (0 + 1) / (3 + 2) = .2; unknown item: .5.
    values = baselines.item_mean(list("aaabbb"), [1, 1, 1, 0, 0, 0], ["a", "b", "new"], prior_weight=2)
    np.testing.assert_allclose(values, [0.8, 0.2, 0.5], rtol=1e-12)
    plain = baselines.item_mean(list("aaabbb"), [1, 1, 1, 0, 0, 0], ["a", "b", "new"], prior_weight=0)
    np.testing.assert_allclose(plain, [1.0, 0.0, 0.5], rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param((["a"], [1.0, 0.0], ["a"]), ShapeError, id="lengths-differ"),
        pytest.param(([], [], ["a"]), DataError, id="no-training-rows"),
        pytest.param((["a"], [np.nan], ["a"]), DataError, id="missing-label"),
        pytest.param((["a"], [1.0], ["a"], -1.0), ConfigError, id="negative-prior"),
    ],
)
def test_bad_ranking_input_is_refused(arguments, error):
    with pytest.raises(error):
        baselines.item_mean(*arguments)


@pytest.mark.slow
def test_popularity_on_movielens_reproduces_the_anchor_figures(shared_dir):
    with zipfile.ZipFile(shared_dir / "data" / "ml-1m.zip") as archive:
        movies = [
            line.split("::")[0] for line in archive.read("ml-1m/movies.dat").decode("latin-1").splitlines()
        ]
        text = archive.read("ml-1m/ratings.dat").replace(b"::", b",")
    ratings = pl.read_csv(
        io.BytesIO(text),
        has_header=False,
        new_columns=["user", "item", "rating", "time"],
        schema_overrides={"user": pl.String, "item": pl.String},
    ).sort("time", maintain_order=True)
    train, test = ratings[: int(0.8 * len(ratings))], ratings[int(0.9 * len(ratings)) :]
    wanted = test.group_by("user", maintain_order=True).agg(positives="item")
    users = wanted.join(train.group_by("user").agg(seen="item"), on="user", maintain_order="left")
    assert len(users) == 1009

    codes = {item: code for code, item in enumerate(movies)}
    items, times = np.array([codes[item] for item in train["item"]]), train["time"].to_numpy()
    seen = [np.array([codes[item] for item in row]) for row in users["seen"]]
    positives = [[codes[item] for item in row] for row in users["positives"]]
    figures = {}
    for name, scores in (
        ("popularity", baselines.popularity(items, len(movies))),
        ("recent_popularity", baselines.recent_popularity(items, times, len(movies))),
    ):
        hits = metrics.match_positives(baselines.recommend(scores, seen, 100), positives)
        values = metrics.retrieval_metrics(*hits, (10, 100), ("recall", "ndcg"))
        keys = [f"{metric}_at_{k}" for metric in ("recall", "ndcg") for k in (10, 100)]
        figures[name] = [round(metrics.macro_mean(values[key]), 3) for key in keys]
    # Measured by others with other code: recall@10, recall@100, NDCG@10, NDCG@100.
    assert figures == {
        "popularity": [0.037, 0.219, 0.235, 0.223],
        "recent_popularity": [0.047, 0.251, 0.247, 0.241],
    }


@pytest.mark.slow
def test_means_on_kuairand_reproduce_the_anchor_figures(shared_dir):
    with tarfile.open(shared_dir / "data" / "KuaiRand-Pure-subset.tar.gz") as archive:
        member = archive.extractfile("KuaiRand-Pure/data/log_standard_4_22_to_5_08_pure.csv")
        assert member is not None
        log = pl.read_csv(member.read())
    # The cap of the anchor: five times the duration, which counts as one second at least.
    log = log.with_columns(
        watch=pl.min_horizontal("play_time_ms", 5 * pl.col("duration_ms").clip(lower_bound=1000)) / 1000
    )
    train = log.filter(pl.col("date").is_between(20220425, 20220504))
    test = log.filter(pl.col("date").is_between(20220506, 20220508))
    assert len(test) == 43_268

    item_ids, asked = train["video_id"].to_list(), test["video_id"].to_list()

    def judge(label):
        found = baselines.item_mean(item_ids, train[label].to_numpy(), asked)
        return metrics.ranking_metrics(
            TaskKind.BINARY, test[label].to_numpy(), found, test["user_id"].to_numpy()
        )

    click, long_view, like = judge("is_click"), judge("long_view"), judge("is_like")
    # The anchors come from another implementation whose smoothing is not recorded: .001 is its leeway.
    assert click["auc"] == pytest.approx(0.667, abs=1e-3)
    assert click["gauc"] == pytest.approx(0.614, abs=1e-3)
    assert long_view["auc"] == pytest.approx(0.675, abs=1e-3)
    assert long_view["gauc"] == pytest.approx(0.626, abs=1e-3)
    assert like["auc"] == pytest.approx(0.677, abs=1e-3)
    # The anchor of watch time, 19.81 s, is the best constant: the median.
    watched = test["watch"].to_numpy()
    median = np.full(len(watched), train["watch"].median())
    assert metrics.mae(watched, median) == pytest.approx(19.81, abs=5e-3)
