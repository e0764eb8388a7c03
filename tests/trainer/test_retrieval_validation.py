"""Validation ranks every item for every user, exactly, and in as many steps as fit into memory."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import retrieval_world as world
from trainer import progress, retrieval_validation
from trainer.index import NO_ROW
from trainer.retrieval_validation import NDCG, RECALL, ValidationUsers, load_validation_users, validate

NUM_USERS, NUM_ITEMS = 23, 400
rng = np.random.default_rng(0)
QUERIES = rng.normal(size=(NUM_USERS, 8)).astype(np.float32)
CANDIDATES = rng.normal(size=(NUM_ITEMS, 8)).astype(np.float32)
SEEN = rng.integers(-1, NUM_ITEMS, size=(NUM_USERS, 30)).astype(np.int32)
POSITIVES = [rng.integers(NUM_ITEMS, size=5).tolist() for _ in range(NUM_USERS)]
USERS = ValidationUsers({}, POSITIVES, SEEN)


def _recall(scores: np.ndarray) -> float:
    """By sorting everything, one user after the other."""
    recalls = []
    for row, seen, positives in zip(scores, SEEN, POSITIVES, strict=True):
        ranked = [item for item in np.argsort(-row, kind="stable") if item not in set(seen.tolist())]
        recalls.append(len(set(ranked[:100]) & set(positives)) / len(set(positives)))
    return float(np.mean(recalls))


def test_recall_equals_that_of_sorting_everything() -> None:
    assert validate(QUERIES, CANDIDATES, USERS)[RECALL] == pytest.approx(_recall(QUERIES @ CANDIDATES.T))


def test_of_several_vectors_of_a_user_the_nearest_counts() -> None:
    several = np.stack([QUERIES, QUERIES[::-1]], axis=1)
    scores = np.maximum(QUERIES @ CANDIDATES.T, QUERIES[::-1] @ CANDIDATES.T)
    assert validate(several, CANDIDATES, USERS)[RECALL] == pytest.approx(_recall(scores))


def test_small_steps_give_the_same_figures_and_tell_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = validate(QUERIES, CANDIDATES, USERS)
    monkeypatch.setattr(retrieval_validation, "_MAX_SCORES", 6 * NUM_ITEMS)
    monkeypatch.setattr(progress, "_INTERVAL_S", -1.0)
    with caplog.at_level(logging.INFO):
        assert validate(QUERIES, CANDIDATES, USERS) == whole
    told = [record.message for record in caplog.records if record.name == progress.logger.name]
    percents = {0: 0, 6: 26, 12: 52, 18: 78, 23: 100}
    assert told == [
        f"{done} of 23 validation users ranked ({percent} %)" for done, percent in percents.items()
    ]


def test_a_catalogue_smaller_than_the_list_is_ranked_as_far_as_it_goes() -> None:
    # Item 0 is seen; the positive, item 2, follows item 1.
    users = ValidationUsers({}, [[2]], np.array([[0, NO_ROW]], np.int32))
    measured = validate(np.ones((1, 1), np.float32), np.array([[3.0], [2.0], [1.0]], np.float32), users)
    assert measured[RECALL] == 1.0
    assert measured[NDCG] == pytest.approx(1 / np.log2(3))


def _user_state(user_id: str, **lists: list[str]) -> bytes:
    feature = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode() for value in values]))
        for name, values in {"user_id": [user_id], "segment": ["s0"], **lists}.items()
    }
    feature["event_time_unix_s"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[1_700_000_000]))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def test_batches_without_a_user_to_validate_on_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval_validation, "_BATCH", 2)
    states = [
        _user_state("u0"),
        _user_state("u1", history_item_ids=["i1"]),
        _user_state("u2", eval_item_ids=["i2"]),
        _user_state("u3"),
        _user_state("u4", history_item_ids=["i7", "i8"], seen_item_ids=["i7"], eval_item_ids=["i9"]),
        _user_state("u5"),
    ]
    with tf.io.TFRecordWriter(str(tmp_path / "states.gz"), "GZIP") as writer:
        for state in states:
            writer.write(state)
    users = load_validation_users(
        [str(tmp_path / "*.gz")], world.FakeTransform(), world.catalogue(), world.SPEC, max_users=10
    )
    # Row r of the catalogue is item r; its transformed id, and that of user r, is r + 2.
    assert list(users.positive_rows) == [[9]]
    assert users.seen_rows.tolist() == [[7]]
    assert users.query["user_id_id"].tolist() == [6]
    assert users.query["history_item_ids_ids"].tolist() == [[9, 10]]
