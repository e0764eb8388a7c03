"""The final score against hand calculations; weights as people and requests give them."""

import doctest
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from schema.contract import TaskSpec, load_dataset_spec
from schema.errors import ConfigError, ShapeError
from trainer import score
from trainer.score import (
    SCORE_WEIGHTS,
    declared_weights,
    final_score,
    formula,
    parse_weights,
    request_weights,
)

NAN = math.nan
CLICK = TaskSpec(name="click", label="click", kind="binary", score_weight=1.0)
LIKE = TaskSpec(name="like", label="like", kind="binary", score_weight=0.0)
WATCH = TaskSpec(name="watch_time", label="watch_time_s", kind="watch_time", score_weight=0.02)
HIDE = TaskSpec(name="hide", label="hide", kind="binary", score_weight=-3.0)
TASKS = (CLICK, LIKE, WATCH, HIDE)
# One request, two candidates.
OUTPUTS = {
    "click": tf.constant([[0.5, 0.25]]),
    "like": tf.constant([[0.1, 0.2]]),
    "watch_time": tf.constant([[10.0, 100.0]]),
    "hide": tf.constant([[0.0, 0.5]]),
    "item_is_known": tf.constant([[1.0, 1.0]]),
}


def test_worked_examples_in_the_docstrings_hold() -> None:
    outcome = doctest.testmod(score)
    assert outcome.attempted >= 7
    assert outcome.failed == 0


def test_score_is_the_weighted_sum_of_the_outputs() -> None:
    # .5 + .02 × 10 − 3 × 0 and .25 + .02 × 100 − 3 × .5
    expected = [[0.7, 0.75]]
    np.testing.assert_allclose(final_score(OUTPUTS, declared_weights(TASKS)), expected, rtol=1e-6)


def test_each_request_is_scored_with_its_own_weights() -> None:
    outputs = {name: tf.repeat(value, 2, axis=0) for name, value in OUTPUTS.items()}
    weights = request_weights(tf.constant([[NAN, NAN, NAN, NAN], [2.0, 10.0, 0.0, NAN]]), TASKS)
    # The second request: 2 × .5 + 10 × .1 − 3 × 0 and 2 × .25 + 10 × .2 − 3 × .5
    expected = [[0.7, 0.75], [2.0, 1.0]]
    np.testing.assert_allclose(final_score(outputs, weights), expected, rtol=1e-6)


def test_weights_of_a_request_reorder_its_candidates() -> None:
    for weights, best in (([NAN] * 4, 1), ([1.0, 0.0, 0.0, 0.0], 0), ([0.0, 1.0, 0.0, 0.0], 1)):
        scores = final_score(OUTPUTS, request_weights(tf.constant([weights]), TASKS))
        assert int(tf.argmax(scores[0])) == best


class _Ranker(tf.Module):
    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, 4], tf.float32, SCORE_WEIGHTS)])
    def weighted(self, score_weights: Any) -> dict[str, Any]:
        weights = request_weights(score_weights, TASKS)
        return {"score": final_score(OUTPUTS, weights)}


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param([-1.0, NAN, NAN, NAN], id="negative"),
        pytest.param([NAN, NAN, math.inf, NAN], id="infinite"),
        pytest.param([NAN, NAN, NAN, -math.inf], id="infinitely-negative-feedback"),
        pytest.param([NAN, NAN, NAN, 1.0], id="negative-feedback-rewarded"),
    ],
)
def test_saved_signature_refuses_a_bad_weight_and_takes_a_good_one(
    tmp_path: Path, weights: list[float]
) -> None:
    ranker = _Ranker()
    tf.saved_model.save(ranker, str(tmp_path), signatures={"serving_weighted": ranker.weighted})
    loaded = tf.saved_model.load(str(tmp_path))
    serve = loaded.signatures["serving_weighted"]
    good = tf.constant([[NAN, NAN, NAN, -4.0]])
    np.testing.assert_allclose(serve(score_weights=good)["score"], [[0.7, 0.25]], rtol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"click, like, watch_time, hide \(<= 0\)"):
        serve(score_weights=tf.constant([[NAN] * 4, weights]))


@pytest.mark.parametrize("shape", [[2, 3], [2, 1], [4]])
def test_weights_of_another_number_of_tasks_are_refused(shape: list[int]) -> None:
    with pytest.raises(ShapeError, match=r"expected \[B, 4\]: click, like, watch_time, hide \(<= 0\)"):
        request_weights(tf.zeros(shape), TASKS)


def test_weight_without_an_output_is_refused() -> None:
    with pytest.raises(ConfigError, match="no output for the score weights of share"):
        final_score(OUTPUTS, {"click": 1.0, "share": 1.0})
    with pytest.raises(ConfigError, match="no task at all"):
        final_score(OUTPUTS, {})


def test_parsed_weights_override_the_declared_ones() -> None:
    assert parse_weights(" like = 2.5, click=0 ", TASKS) == {
        "click": 0.0,
        "like": 2.5,
        "watch_time": 0.02,
        "hide": -3.0,
    }
    assert list(parse_weights("hide=-1e1", TASKS)) == ["click", "like", "watch_time", "hide"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "'' is no task=weight; give for instance click=1", id="empty"),
        pytest.param("click", "'click' is no task=weight", id="no-value"),
        pytest.param("click=1,", "'' is no task=weight", id="trailing-comma"),
        pytest.param("=1", "'=1' is no task=weight", id="no-name"),
        pytest.param("clik=1", "no task 'clik'; declared: click, like, watch_time, hide", id="unknown"),
        pytest.param("click=1,click=2", "'click' is named twice", id="twice"),
        pytest.param("click=one", "'one' is no number", id="word"),
        pytest.param("click=nan", "click is nan; give a finite number", id="nan"),
        pytest.param("hide=-inf", "hide is -inf; give a finite number", id="infinite"),
        pytest.param("click=-1", "click is -1, expected 0 or more", id="negative"),
        pytest.param("like=-1", "like is -1, expected 0 or more", id="negative-of-an-unused-task"),
        pytest.param("hide=1", "hide is 1, expected 0 or less.*score_weight -3", id="feedback-rewarded"),
    ],
)
def test_bad_weights_are_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_weights(text, TASKS)


def test_formula_reads_as_a_person_writes_it() -> None:
    assert formula(TASKS) == "score = 1 × click + 0.02 × watch_time [s] − 3 × hide"
    assert formula([HIDE, LIKE]) == "score = −3 × hide"
    assert formula([LIKE]) == "score = 0"
    assert formula(TASKS, {"click": 0.0, "like": 2.0, "watch_time": 0.0, "hide": 0.0}) == "score = 2 × like"


def test_a_dislike_counts_against_an_item_of_the_simulated_platform() -> None:
    assert formula(load_dataset_spec("simulated").tasks) == (
        "score = 1 × click + 2 × like + 0.5 × completion + 0.02 × watch_time [s] − 10 × dislike"
    )


def test_reading_weights_does_not_load_tensorflow() -> None:
    code = "import sys, trainer.score; print('tensorflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == ["False"]
