from pathlib import Path

import numpy as np
import pytest

from benchmarks.protocols import global_temporal, leave_one_out, leave_one_out_metrics, load_tables
from schema.errors import DataError, ShapeError
from tests.benchmarks.tiny_tables import split_tables, tables


def as_lists(arrays):
    return [array.tolist() for array in arrays]


def test_temporal_history_is_the_train_split_alone():
    protocol = global_temporal(split_tables())
    assert protocol.train.toarray().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert protocol.train_items.tolist() == [0, 1, 1, 0, 2]
    assert protocol.train_times_unix_s.tolist() == [10, 20, 20, 30, 30]


def test_temporal_positives_are_distinct_unseen_and_in_time_order():
    protocol = global_temporal(split_tables())
    assert protocol.test.user_ids == ("u",)  # all that v chose again had been seen
    assert as_lists(protocol.test.positives) == [[3, 2]]
    assert protocol.test.history.toarray().tolist() == [[1, 1, 0, 0, 0]]
    assert as_lists(protocol.validation.positives) == [[2]]


def test_users_without_history_are_apart_and_have_seen_nothing():
    cold = global_temporal(split_tables()).cold_test
    assert cold.user_ids == ("w",)
    assert as_lists(cold.positives) == [[1]]
    assert cold.history.nnz == 0


def test_cold_items_are_those_that_nobody_met_in_training():
    protocol = global_temporal(split_tables())
    assert protocol.cold_items.tolist() == [False, False, False, True, True]
    restricted = protocol.test.restricted_to(protocol.cold_items)
    assert restricted.user_ids == ("u",)
    assert as_lists(restricted.positives) == [[3]]
    assert len(protocol.validation.restricted_to(protocol.cold_items)) == 0


def test_temporal_split_without_returning_users_is_an_error():
    data = tables(("u", "a", 1, "train"), ("v", "b", 2, "eval"), ("v", "a", 3, "test"))
    with pytest.raises(DataError, match="no user of the validation window"):
        global_temporal(data)


def test_leave_one_out_holds_out_the_last_two_and_breaks_ties_by_file_order():
    data = leave_one_out(
        tables(
            ("u", "d", 7, "train"),
            ("u", "a", 5, "train"),
            ("u", "b", 7, "train"),
            ("u", "c", 5, "train"),
            ("v", "a", 1, "test"),
            ("v", "b", 2, "test"),
            ("v", "e", 3, "test"),
        )
    )
    u, v = data.user_ids.index("u"), data.user_ids.index("v")
    assert data.train(u).tolist() == [0, 2]
    assert data.history(u, "validation").tolist() == [0, 2]
    assert data.history(u, "test").tolist() == [0, 2, 3]
    assert data.targets("validation")[[u, v]].tolist() == [3, 1]
    assert data.targets("test")[[u, v]].tolist() == [1, 4]


def test_leave_one_out_refuses_users_with_too_few_items():
    with pytest.raises(DataError, match="1 users have fewer than 3 positives"):
        leave_one_out(tables(("u", "a", 1, "train"), ("u", "b", 2, "test")))


@pytest.fixture
def two_sequences():
    """u: a, b, then c, then d; v: b, a, then d, then e."""
    return leave_one_out(
        tables(
            *[("u", item, time, "train") for time, item in enumerate("abcd")],
            *[("v", item, time + 10, "train") for time, item in enumerate("bade")],
        )
    )


def test_leave_one_out_metrics_equal_a_hand_calculation(two_sequences):
    # u has seen a, b, c; left are d (wanted, .4) and e (.5): rank 2.
    # v has seen b, a, d; left are c (.1) and e (wanted, .3): rank 1.
    scores = np.array([[9.0, 8.0, 7.0, 0.4, 0.5], [9.0, 8.0, 0.1, 7.0, 0.3]])
    at_1 = leave_one_out_metrics(two_sequences, lambda users: scores[users], "test", k=1, batch_size=1)
    at_2 = leave_one_out_metrics(two_sequences, lambda users: scores[users], "test", k=2)
    assert at_1["hit_rate_at_1"].tolist() == [0.0, 1.0]
    assert at_2["hit_rate_at_2"].tolist() == [1.0, 1.0]
    assert at_2["ndcg_at_2"] == pytest.approx([1 / np.log2(3), 1.0])


def test_validation_item_is_a_candidate_before_the_test_only(two_sequences):
    # Best is the validation item of each: found in the validation, out of the way in the test.
    scores = np.array([[0.0, 0.0, 3.0, 2.0, 1.0], [0.0, 0.0, 1.0, 3.0, 2.0]])
    for split in ("validation", "test"):
        found = leave_one_out_metrics(two_sequences, lambda users: scores[users], split, k=1)
        assert found["hit_rate_at_1"].tolist() == [1.0, 1.0]


def test_equal_scores_find_nothing(two_sequences):
    found = leave_one_out_metrics(two_sequences, lambda users: np.zeros((len(users), 5)), "test", k=1)
    assert found["hit_rate_at_1"].tolist() == [0.0, 0.0]


def test_scores_of_the_wrong_shape_or_nan_are_refused(two_sequences):
    with pytest.raises(ShapeError, match="users by items"):
        leave_one_out_metrics(two_sequences, lambda users: np.zeros((len(users), 4)), "test")
    with pytest.raises(DataError, match="NaN"):
        leave_one_out_metrics(two_sequences, lambda users: np.full((len(users), 5), np.nan), "test")


@pytest.mark.slow
def test_movielens_protocols_have_the_published_sizes(shared_dir: Path, tmp_path: Path):
    data = load_tables("movielens-1m", shared_dir / "data", tmp_path)
    protocol = global_temporal(data)
    assert (len(protocol.train_items), len(protocol.item_ids), len(protocol.test)) == (800_167, 3_883, 1_009)
    held_out = leave_one_out(data)
    assert len(held_out.user_ids) == 6_040
    assert sum(map(len, held_out.sequences)) == 1_000_209
