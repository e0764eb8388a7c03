"""Baselines against hand calculations and the published anchor figures."""

import io
import math
import tarfile
import zipfile

import numpy as np
import polars as pl
import pytest

from schema.contract import TaskKind
from schema.errors import ConfigError, DataError, ShapeError
from trainer import baselines

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


def test_retrieval_baselines_worked_by_hand():
    # Popular: a (3), b (2), c (1), d (0). In the last 7 days: c only; then a, b, d by all of training.
    # u has seen a and wants c and z (not in the catalogue): popular [b, c], recent [c, b]; v wants nothing.
    result = baselines.evaluate_retrieval_baselines(
        train_item_ids=["a", "a", "a", "b", "b", "c", "gone"],
        train_event_time_unix_s=np.array([0, 1, 2, 3, 4, 50, 51]) * DAY,
        catalogue_item_ids=["d", "c", "b", "a"],
        seen_item_ids=[["a"], []],
        positive_item_ids=[["c", "z"], []],
        cold_positive_item_ids=[["z"], []],
        ks=(1, 2),
    )
    popular, recent = result["popularity"], result["recent_popularity"]
    assert popular["retrieval/recall_at_1"] == 0.0
    assert popular["retrieval/recall_at_2"] == 0.5
    assert popular["retrieval/mrr_at_2"] == 0.5
    assert popular["retrieval/ndcg_at_2"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert popular["retrieval/distinct_items_at_2"] == 3  # b, c for u and a, b for v
    assert popular["retrieval/cold_item_recall_at_2"] == 0.0
    assert recent["retrieval/recall_at_1"] == 0.5
    assert recent["retrieval/hit_rate_at_1"] == 1.0
    assert result.keys() == {"popularity", "recent_popularity", "random"}


def test_cold_items_are_found_by_upload_time_and_by_chance() -> None:
    # Of a, b (trained on) and new, newer (not), u has seen a and wants b and new; v wants newer, w only b.
    # Newest first, all get [newer, new]. By chance u finds each of 3 unseen items among 2 with 2 / 3, v and w
    # each of 4 with 2 / 4.
    result = baselines.evaluate_retrieval_baselines(
        train_item_ids=["a", "a", "b"],
        train_event_time_unix_s=[0, 1, 2],
        catalogue_item_ids=["a", "b", "new", "newer"],
        upload_time_unix_s=[5, -1, 7, 9],
        seen_item_ids=[["a"], [], []],
        positive_item_ids=[["b", "new"], ["newer"], ["b"]],
        cold_positive_item_ids=[["new"], ["newer"], []],
        ks=(1, 2),
    )
    newest, random = result["newest"], result["random"]
    assert newest["retrieval/cold_item_recall_at_1"] == 0.5
    assert newest["retrieval/cold_item_recall_at_2"] == 1.0
    assert newest["retrieval/recall_at_2"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert random["retrieval/cold_item_recall_at_2"] == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert random["retrieval/recall_at_2"] == pytest.approx((2 / 3 + 2 / 4 + 2 / 4) / 3)
    # The one unseen item for u that anybody chose is b.
    assert result["popularity"]["retrieval/cold_item_recall_at_1"] == 0.0


def test_retrieval_cut_off_beyond_the_catalogue_is_judged_on_short_lists():
    result = baselines.evaluate_retrieval_baselines(
        train_item_ids=["a"],
        train_event_time_unix_s=[0],
        catalogue_item_ids=["a", "b"],
        seen_item_ids=[[]],
        positive_item_ids=[["b"]],
        cold_positive_item_ids=[["b"]],
        ks=(100,),
    )
    for name in ("popularity", "random"):
        assert result[name]["retrieval/recall_at_100"] == 1.0


def test_item_mean_is_pulled_towards_the_global_mean_by_the_prior():
    # Global mean .5; item a: (3 + 2 * .5) / (3 + 2) = .8; item b: (0 + 1) / (3 + 2) = .2; unknown item: .5.
    values = baselines.item_mean(list("aaabbb"), [1, 1, 1, 0, 0, 0], ["a", "b", "new"], prior_weight=2)
    np.testing.assert_allclose(values, [0.8, 0.2, 0.5], rtol=1e-12)
    plain = baselines.item_mean(list("aaabbb"), [1, 1, 1, 0, 0, 0], ["a", "b", "new"], prior_weight=0)
    np.testing.assert_allclose(plain, [1.0, 0.0, 0.5], rtol=1e-12)


def test_ranking_baselines_worked_by_hand_without_the_rows_that_have_no_label():
    result = baselines.evaluate_ranking_baselines(
        task="click",
        kind=TaskKind.BINARY,
        train_item_ids=["a", "a", "b", "b", "b"],
        train_labels=[1, 1, 0, 0, np.nan],
        eval_item_ids=["a", "b", "b", "a"],
        eval_labels=[1, 0, np.nan, 0],
        eval_user_ids=["u", "u", "u", "v"],
        prior_weight=0,
    )
    assert result["item_mean"]["ranking/click/auc"] == 0.75  # a beats b, a ties with a
    assert result["item_mean"]["ranking/click/gauc"] == 1.0  # u only
    assert result["global_mean"]["ranking/click/auc"] == 0.5
    assert result["global_mean"]["ranking/click/log_loss"] == pytest.approx(math.log(2))
    assert result.keys() == {"global_mean", "item_mean"}


def test_watch_time_is_judged_on_the_median_too_the_best_constant_for_absolute_error():
    result = baselines.evaluate_ranking_baselines(
        task="watch",
        kind=TaskKind.WATCH_TIME,
        train_item_ids=["a", "b", "c"],
        train_labels=[1.0, 2.0, 60.0],
        eval_item_ids=["a", "b", "c"],
        eval_labels=[1.0, 2.0, 60.0],
        eval_user_ids=["u", "u", "v"],
        prior_weight=0,
    )
    assert result["global_median"]["ranking/watch/mae"] == pytest.approx(59 / 3)
    assert result["global_mean"]["ranking/watch/mae"] == pytest.approx((20 + 19 + 39) / 3)
    assert result["item_mean"] == {"ranking/watch/mae": 0.0, "ranking/watch/xauc": 1.0}


RETRIEVAL_INPUT = {
    "train_item_ids": ["a"],
    "train_event_time_unix_s": [0],
    "catalogue_item_ids": ["a", "b"],
    "seen_item_ids": [[]],
    "positive_item_ids": [["b"]],
    "cold_positive_item_ids": [[]],
    "ks": (1,),
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        pytest.param({"train_event_time_unix_s": [0, 1]}, ShapeError, "1 training items", id="times-differ"),
        pytest.param({"seen_item_ids": []}, ShapeError, "seen items of 0 users", id="users-differ"),
        pytest.param({"catalogue_item_ids": []}, DataError, "catalogue of 0 rows", id="empty-catalogue"),
        pytest.param({"train_item_ids": [1]}, DataError, "none of the 1", id="ids-of-another-kind"),
        pytest.param({"catalogue_item_ids": ["a", "a"]}, DataError, "1 distinct", id="repeated-item"),
        pytest.param({"ks": ()}, ConfigError, "at least one k", id="no-cut-off"),
        pytest.param({"ks": (0,)}, ConfigError, "k is 0", id="cut-off-zero"),
        pytest.param({"window_days": 0.0}, ConfigError, "window_days", id="no-window"),
    ],
)
def test_bad_retrieval_input_is_refused_with_a_reason(change, error, text):
    with pytest.raises(error, match=text):
        baselines.evaluate_retrieval_baselines(**{**RETRIEVAL_INPUT, **change})


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

    result = baselines.evaluate_retrieval_baselines(
        train_item_ids=train["item"].to_list(),
        train_event_time_unix_s=train["time"].to_numpy(),
        catalogue_item_ids=movies,
        seen_item_ids=users["seen"].to_list(),
        positive_item_ids=users["positives"].to_list(),
        cold_positive_item_ids=[[] for _ in range(len(users))],
        ks=(10, 100),
    )
    figures = {
        name: [
            round(result[name][f"retrieval/{metric}_at_{k}"], 3)
            for metric in ("recall", "ndcg")
            for k in (10, 100)
        ]
        for name in ("popularity", "recent_popularity")
    }
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

    def judge(label, kind):
        return baselines.evaluate_ranking_baselines(
            task=label,
            kind=kind,
            train_item_ids=train["video_id"].to_list(),
            train_labels=train[label].to_numpy(),
            eval_item_ids=test["video_id"].to_list(),
            eval_labels=test[label].to_numpy(),
            eval_user_ids=test["user_id"].to_list(),
        )

    click, long_view = (judge(label, TaskKind.BINARY)["item_mean"] for label in ("is_click", "long_view"))
    like, watch = judge("is_like", TaskKind.BINARY)["item_mean"], judge("watch", TaskKind.WATCH_TIME)
    # The anchors come from another implementation whose smoothing is not recorded: .001 is its leeway.
    assert click["ranking/is_click/auc"] == pytest.approx(0.667, abs=1e-3)
    assert click["ranking/is_click/gauc"] == pytest.approx(0.614, abs=1e-3)
    assert long_view["ranking/long_view/auc"] == pytest.approx(0.675, abs=1e-3)
    assert long_view["ranking/long_view/gauc"] == pytest.approx(0.626, abs=1e-3)
    assert like["ranking/is_like/auc"] == pytest.approx(0.677, abs=1e-3)
    # The anchor of watch time, 19.81 s at XAUC .500, is the best constant.
    assert watch["global_median"]["ranking/watch/mae"] == pytest.approx(19.81, abs=5e-3)
    assert watch["global_median"]["ranking/watch/xauc"] == 0.5
