"""Position towers, inverse propensities and down-sampling against slow NumPy and against planted truths."""

import json
import math
from typing import Any

import numpy as np
import pydantic
import pytest
import scipy.optimize
import tensorflow as tf

from schema.contract import TaskKind, TaskSpec
from schema.errors import ConfigError, DataError, ShapeError
from trainer.debiasing import (
    PositionBias,
    PositionStatistics,
    correct_sampled_logit,
    inverse_propensity_weights,
    position_statistics,
    product_logit,
    sample_negatives,
    smooth_mean_label,
)
from trainer.debiasing_config import PositionConfig, has_position_bias
from trainer.off_policy import effective_sample_size

NAN = math.nan
CLICK = TaskSpec(name="click", label="y", kind=TaskKind.BINARY)
WATCH = TaskSpec(name="watch", label="t", kind=TaskKind.WATCH_TIME)
SHARE = TaskSpec(name="share", label="c", kind=TaskKind.COMPLETION)
ORDINAL = TaskSpec(name="ordinal", label="t", kind=TaskKind.WATCH_TIME, method="ordinal")
RANKS = TaskSpec(
    name="ranks", label="t", kind=TaskKind.WATCH_TIME, method="duration_quantiles", duration_feature="length"
)
STARS = TaskSpec(name="stars", label="r", kind=TaskKind.REGRESSION)
PAL = PositionConfig(kind="pal", max_position=3)
ADDITIVE = PositionConfig(kind="additive", max_position=3)
# One surface; position 0 is never used, as in a log that counts from 1.
STATISTICS = PositionStatistics(rows=[[0, 50, 30, 20]], mean_label=[[0.4, 0.4, 0.3, 0.1]])


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def log_odds(p: Any) -> Any:
    return np.log(p) - np.log1p(-np.asarray(p, np.float64))


def at(bias: PositionBias, position: int, logit: float = 0.3, surface: int | None = None) -> float:
    """The logit of one row as shown."""
    rows = None if surface is None else tf.constant([surface])
    return float(bias(tf.constant([logit]), tf.constant([position]), rows)[0])


# --- the product of probabilities


@pytest.mark.parametrize("logit", [-60.0, -5.0, 0.0, 0.3, 5.0, 30.0, 60.0])
@pytest.mark.parametrize("factor", [1.0, 0.999999, 0.5, 1e-6])
def test_logit_of_a_product_is_exact_where_float32_probabilities_are_not(logit: float, factor: float) -> None:
    log_factor = np.float64(np.float32(math.log(factor)))
    s = np.exp(log_factor)
    # 1 - s σ(f) = ((1 - s) e^f + 1) / (1 + e^f), without cancellation in float64.
    expected = log_factor + logit - np.log1p(-np.expm1(log_factor) * np.exp(logit))
    assert s <= 1
    found = product_logit(tf.constant(logit), tf.constant(log_factor, tf.float32))
    assert found.numpy() == pytest.approx(expected, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("logit", [-500.0, -60.0, 0.0, 60.0, 500.0])
def test_product_has_a_finite_gradient_even_at_certainty(logit: float) -> None:
    f, log_factor = tf.Variable(logit), tf.Variable(0.0)
    with tf.GradientTape() as tape:
        loss = tf.nn.sigmoid_cross_entropy_with_logits(0.0, product_logit(f, log_factor))
    assert all(np.isfinite(gradient.numpy()) for gradient in tape.gradient(loss, [f, log_factor]))


# --- statistics of the training data


def windows_of(**columns: Any) -> list[dict[str, np.ndarray]]:
    rows = {name: np.asarray(column) for name, column in columns.items()}
    half = len(rows["position"]) // 2
    return [{n: c[:half] for n, c in rows.items()}, {n: c[half:] for n, c in rows.items()}]


def test_rows_are_counted_by_surface_and_position_and_deep_positions_share_a_row() -> None:
    windows = windows_of(
        position=[1, 2, 2, 9, -1, 1, 3, 2],
        surface=[0, 0, 0, 0, 0, 1, 1, 0],
        y=[1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, NAN],
    )
    found = position_statistics(windows, [CLICK], PAL, num_surfaces=3, surface_name="surface")["click"]
    # The missing position and the missing label are not counted.
    assert found.rows == [[0, 1, 2, 1], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert found.mean_label[2] == [None] * 4
    assert found == PositionStatistics(**json.loads(json.dumps(vars(found))))


def test_without_surfaces_all_rows_are_of_one() -> None:
    windows = windows_of(position=[1, 2, 1, 2], y=[1.0, 0.0, 1.0, 1.0])
    assert position_statistics(windows, [CLICK], PAL)["click"].rows == [[0, 2, 2, 0]]


def test_exploration_alone_teaches_the_means_but_all_rows_make_the_average_position() -> None:
    rng = np.random.default_rng(0)
    explores = np.repeat([1.0, 0.0, NAN], 2000)
    position = np.tile([1, 2], 3000)
    # Outside the bucket the labels say the opposite.
    rate = np.where(explores == 1, np.where(position == 1, 0.8, 0.4), np.where(position == 1, 0.1, 0.9))
    windows = windows_of(
        position=position, exploration=explores, y=(rng.random(6000) < rate).astype(np.float32)
    )
    config = PositionConfig(kind="pal", max_position=2, learn_from="exploration")
    found = position_statistics(windows, [CLICK], config)["click"]
    assert found.rows == [[0, 3000, 3000]]
    # 1,000 rows each: a standard error of .016.
    assert found.mean_label[0][1:] == pytest.approx([0.8, 0.4], abs=0.05)


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"position": [-1, -1], "y": [1.0, 0.0]}, id="no-position"),
        pytest.param({"position": [1, 2], "y": [NAN, NAN]}, id="no-label"),
        pytest.param({"position": [1, 2], "y": [1.0, 0.0], "exploration": [0.0, NAN]}, id="no-exploration"),
    ],
)
def test_data_without_anything_to_learn_positions_from_are_refused(columns: dict[str, Any]) -> None:
    learn_from = "exploration" if "exploration" in columns else "all"
    config = PositionConfig(kind="pal", max_position=2, learn_from=learn_from)
    with pytest.raises(DataError, match="no such training row has both a position and the label 'y'"):
        position_statistics(windows_of(**columns), [CLICK], config)


def test_surface_whose_clicks_say_nothing_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    windows = windows_of(position=[1, 2, 1, 2], surface=[0, 0, 1, 1], y=[1.0, 0.0, 0.0, 0.0])
    found = position_statistics(windows, [CLICK], PAL, num_surfaces=2, surface_name="surface")["click"]
    assert found.mean_label[1] == [None] * 4
    assert "surfaces_without_position_effect=1" in caplog.text


def slow_smooth(rows: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """The objective as it is written, term by term, minimised without derivatives of our own."""
    mean = total.sum() / rows.sum()
    n, y = rows + 0.5, total + 0.5 * mean
    dispersion = (squares - total**2 / rows).sum() / total.sum()

    def objective(theta: np.ndarray) -> float:
        fit = sum((n[p] * np.exp(theta[p]) - y[p] * theta[p]) / dispersion for p in range(len(n)))
        bends = [theta[p + 1] - 2 * theta[p] + theta[p - 1] for p in range(1, len(n) - 1)]
        return fit + 0.5 * sum((bend / 0.05) ** 2 for bend in bends)

    start = np.full(len(n), np.log(mean))
    return np.exp(scipy.optimize.minimize(objective, start, method="BFGS", options={"gtol": 1e-7}).x)


def test_smoothing_equals_its_formula() -> None:
    rows = np.array([400.0, 300.0, 40.0, 5.0, 30.0])
    total = np.array([200.0, 130.0, 20.0, 0.0, 5.0])
    found = smooth_mean_label(rows, total, total)
    np.testing.assert_allclose(found, slow_smooth(rows, total, total), rtol=1e-4)


def test_smoothing_of_watch_times_knows_how_much_they_vary() -> None:
    rows, total = np.full(4, 50.0), np.array([500.0, 300.0, 450.0, 250.0])
    steady = total**2 / rows * 1.0001
    wild = total**2 / rows * 3
    np.testing.assert_allclose(
        smooth_mean_label(rows, total, wild), slow_smooth(rows, total, wild), rtol=1e-4
    )
    # Nearly equal labels within positions: the differences between positions are real.
    np.testing.assert_allclose(smooth_mean_label(rows, total, steady), total / rows, rtol=0.02)


def test_much_data_speak_for_themselves_and_little_data_lean_on_their_neighbours() -> None:
    curve = 0.5 / (1 + 0.3 * np.arange(6))
    rows = np.array([1e6, 1e6, 1e6, 1e6, 1e6, 2])
    total = rows * curve
    total[5] = 2.0
    found = smooth_mean_label(rows, total, total)
    np.testing.assert_allclose(found[:5], curve[:5], rtol=1e-3)
    assert found[5] == pytest.approx(curve[5], rel=0.1)


def test_smoothing_pads_beyond_the_data_and_gives_up_on_one_position_or_no_positive() -> None:
    rows, total = np.array([0.0, 10.0, 10.0, 0.0]), np.array([0.0, 6.0, 4.0, 0.0])
    found = smooth_mean_label(rows, total, total)
    assert found[0] == found[1]
    assert found[3] == found[2]
    assert smooth_mean_label(np.array([0.0, 9.0]), np.array([0.0, 4.0]), np.array([0.0, 4.0])) is None
    assert smooth_mean_label(rows, 0 * total, 0 * total) is None


# --- the tower


def test_pal_starts_as_the_product_of_the_relative_click_rate_and_relevance() -> None:
    bias = PositionBias(PAL, CLICK, STATISTICS)
    for position, factor in ((1, 1.0), (2, 0.75), (3, 0.25)):
        assert sigmoid(at(bias, position)) == pytest.approx(factor * sigmoid(0.3), rel=1e-5)
    np.testing.assert_allclose(bias.examination_curve(), [[NAN, 1.0, 0.75, 0.25]], rtol=1e-5)


def test_additive_starts_with_the_log_odds_of_the_click_rates_around_their_mean() -> None:
    bias = PositionBias(ADDITIVE, CLICK, STATISTICS)
    odds = log_odds([0.4, 0.3, 0.1])
    mean = 0.5 * odds[0] + 0.3 * odds[1] + 0.2 * odds[2]
    for position in (1, 2, 3):
        assert at(bias, position) == pytest.approx(0.3 + odds[position - 1] - mean, rel=1e-5)


def test_expected_watch_time_is_multiplied() -> None:
    pal = PositionBias(PAL, WATCH, STATISTICS)
    assert at(pal, 3) == pytest.approx(0.3 + math.log(0.25), rel=1e-5)
    additive = PositionBias(ADDITIVE, WATCH, STATISTICS)
    # Both forms are the same family; they differ in what is served.
    np.testing.assert_allclose(additive.examination_curve(), pal.examination_curve(), rtol=1e-5)


def test_served_probability_is_that_of_the_average_training_position() -> None:
    bias = PositionBias(PAL, CLICK, STATISTICS)
    mean = 0.5 * 1 + 0.3 * 0.75 + 0.2 * 0.25
    logits = tf.constant([[0.3, -2.0]])
    np.testing.assert_allclose(sigmoid(bias.served(logits)), mean * sigmoid(logits), rtol=1e-5)
    # The rows of the training data, each at its position, have the same mean.
    shown = [sigmoid(at(bias, position)) for position in (1, 2, 3)]
    assert np.dot(shown, [0.5, 0.3, 0.2]) == pytest.approx(mean * sigmoid(0.3), rel=1e-5)


def test_additive_tower_is_left_out_of_serving() -> None:
    bias = PositionBias(ADDITIVE, CLICK, STATISTICS)
    logits = tf.constant([0.3, -2.0])
    np.testing.assert_array_equal(bias.served(logits), logits)


@pytest.mark.parametrize("config", [PAL, ADDITIVE], ids=["pal", "additive"])
def test_unknown_position_counts_as_the_average_one(config: PositionConfig) -> None:
    bias = PositionBias(config, CLICK, STATISTICS)
    assert at(bias, -1) == pytest.approx(float(bias.served(tf.constant(0.3))), rel=1e-6)
    assert at(bias, 3) != pytest.approx(at(bias, -1), abs=0.1)


def test_positions_beyond_the_maximum_read_the_last_row() -> None:
    bias = PositionBias(PAL, CLICK, STATISTICS)
    assert at(bias, 40) == at(bias, 3)


def test_each_surface_has_its_curve_and_an_unknown_one_stands_at_the_average_of_all() -> None:
    statistics = PositionStatistics(
        rows=[[0, 0, 0, 0], [0, 60, 20, 0], [0, 10, 10, 0]],
        mean_label=[[None] * 4, [0.8, 0.8, 0.4, 0.4], [0.3, 0.3, 0.27, 0.27]],
    )
    bias = PositionBias(PAL, CLICK, statistics)
    curve = bias.examination_curve()
    np.testing.assert_allclose(curve[1:, 1:3], [[1, 0.5], [1, 0.9]], rtol=1e-5)
    assert np.isnan(curve[0]).all()
    served = sigmoid(bias.served(tf.constant([0.3, 0.3, 0.3]), tf.constant([0, 1, 2])))
    mean = np.array([0, 0.75 * 1 + 0.25 * 0.5, 0.5 * 1 + 0.5 * 0.9])
    mean[0] = 0.8 * mean[1] + 0.2 * mean[2]
    np.testing.assert_allclose(served, mean * sigmoid(0.3), rtol=1e-5)
    assert sigmoid(at(bias, 2, surface=1)) == pytest.approx(0.5 * sigmoid(0.3), rel=1e-5)


def test_best_position_is_certain_even_if_it_is_not_the_first() -> None:
    statistics = PositionStatistics(rows=[[0, 5, 5, 5]], mean_label=[[0.9, 0.2, 0.4, 0.1]])
    bias = PositionBias(PAL, CLICK, statistics)
    assert at(bias, 2) == pytest.approx(0.3, abs=1e-6)
    # Position 0 was never shown: it neither sets the scale nor is it more than certain.
    assert at(bias, 0) == pytest.approx(0.3, abs=1e-6)
    np.testing.assert_allclose(bias.examination_curve(), [[NAN, 1.0, 2.0, 0.5]], rtol=1e-5)


def test_additive_curve_compares_the_same_rows_at_both_positions() -> None:
    bias = PositionBias(ADDITIVE, CLICK, STATISTICS)
    logits = np.array([-3.0, 0.0, 4.0])
    odds = log_odds([0.4, 0.3, 0.1])
    b = odds - odds @ [0.5, 0.3, 0.2]
    rates = [sigmoid(logits + effect).mean() for effect in b]
    np.testing.assert_allclose(bias.examination_curve(logits)[0, 1:], rates / rates[0], rtol=1e-5)
    with pytest.raises(DataError, match="no logits of surface 0"):
        bias.examination_curve()


def test_additive_curve_of_a_surface_averages_over_its_own_rows() -> None:
    two = PositionStatistics([[0, 5, 5, 0]] * 2, [[0.5, 0.5, 0.2, 0.2]] * 2)
    bias = PositionBias(ADDITIVE, CLICK, two)
    curve = bias.examination_curve([-6.0, -6.0, 3.0], [0, 0, 1])
    # Where clicks are rare the ratio is that of the odds; where they are frequent it is near 1.
    odds = log_odds([0.5, 0.2])
    rare, frequent = (sigmoid(f + odds - odds.mean()) for f in (-6.0, 3.0))
    np.testing.assert_allclose(curve[:, 2], [rare[1] / rare[0], frequent[1] / frequent[0]], rtol=1e-5)


def test_position_where_everything_is_clicked_has_finite_log_odds() -> None:
    bias = PositionBias(ADDITIVE, CLICK, PositionStatistics([[0, 5, 5]], [[1.01, 1.01, 0.5]]))
    assert np.isfinite([at(bias, 1), at(bias, 2)]).all()


def test_untrained_tower_and_head_serve_the_mean_label() -> None:
    for config in (PAL, ADDITIVE):
        for task, served in ((CLICK, log_odds(0.3)), (WATCH, 0.0), (ORDINAL, log_odds(0.3))):
            bias = PositionBias(config, task, STATISTICS)
            body = tf.constant(bias.initial_bias(float(served)), tf.float32)
            assert float(bias.served(body)) == pytest.approx(served, abs=1e-5)


def test_initial_bias_stays_finite_when_nearly_everything_is_clicked() -> None:
    assert np.isfinite(PositionBias(PAL, CLICK, STATISTICS).initial_bias(4.0))


def test_dropped_positions_read_as_unknown_in_training_only() -> None:
    config = PositionConfig(kind="pal", max_position=3, dropout_fraction=0.25)
    bias = PositionBias(config, CLICK, STATISTICS)
    logits, position = tf.zeros([4000]), tf.fill([4000], 3)
    tf.random.set_seed(1)
    trained = bias(logits, position, training=True).numpy()
    unknown = np.isclose(trained, at(bias, -1, logit=0.0))
    # A standard error of .007.
    assert unknown.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_allclose(trained[~unknown], at(bias, 3, logit=0.0), rtol=1e-6)
    np.testing.assert_allclose(bias(logits, position), at(bias, 3, logit=0.0), rtol=1e-6)


def test_exploration_curve_is_not_trained() -> None:
    config = PositionConfig(kind="pal", max_position=3, learn_from="exploration")
    assert PositionBias(config, CLICK, STATISTICS).trainable_variables == []
    assert len(PositionBias(PAL, CLICK, STATISTICS).trainable_variables) == 1


def test_weights_survive_saving_in_a_module(tmp_path: Any) -> None:
    bias = PositionBias(PAL, CLICK, STATISTICS)
    bias.set_weights([np.array([[0, 0.0, -0.05, 0.1]], np.float32)])
    module = tf.Module()
    module.weights = bias.weights
    module.serve = tf.function(bias.served, autograph=False, input_signature=[tf.TensorSpec([None])])
    tf.saved_model.save(module, str(tmp_path))
    logits = tf.constant([0.3, -1.0])
    loaded = tf.saved_model.load(str(tmp_path))
    np.testing.assert_allclose(loaded.serve(logits), bias.served(logits), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "task", "expected"),
    [
        ("none", CLICK, False),
        ("additive", CLICK, True),
        ("additive", STARS, True),
        ("additive", ORDINAL, True),
        ("pal", CLICK, True),
        ("pal", SHARE, True),
        ("pal", WATCH, True),
        ("pal", ORDINAL, True),
        ("pal", RANKS, False),
        ("pal", STARS, False),
    ],
)
def test_tasks_that_get_a_tower(kind: Any, task: TaskSpec, expected: bool) -> None:
    config = PositionConfig(kind=kind, max_position=3)
    assert has_position_bias(config, task) is expected
    if not expected:
        with pytest.raises(ConfigError, match=f"'{kind}' does not suit the task '{task.name}'"):
            PositionBias(config, task, STATISTICS)


def test_being_seen_multiplies_the_probability_of_every_threshold() -> None:
    bias = PositionBias(PAL, ORDINAL, STATISTICS)
    # Two thresholds of three rows, at positions with e = 1, .75 and .25 and, on average, .775.
    logits = log_odds([[0.8, 0.8, 0.8], [0.2, 0.2, 0.2]]).astype(np.float32)
    shown = bias(tf.constant(logits), tf.constant([1, 2, 3]))
    np.testing.assert_allclose(sigmoid(shown), [[0.8, 0.6, 0.2], [0.2, 0.15, 0.05]], rtol=1e-5)
    served = bias.served(tf.constant(logits))
    np.testing.assert_allclose(sigmoid(served), [[0.62] * 3, [0.155] * 3], rtol=1e-5)
    np.testing.assert_allclose(bias.examination_curve(), [[NAN, 1.0, 0.75, 0.25]], rtol=1e-5)


def test_a_shift_of_many_thresholds_is_the_same_for_each_and_has_no_curve() -> None:
    bias = PositionBias(ADDITIVE, ORDINAL, STATISTICS)
    shift = at(bias, 1) - at(bias, 3)
    logits = tf.constant([[0.5, 0.5], [-1.0, -1.0]])
    shown = bias(logits, tf.constant([1, 3])).numpy()
    np.testing.assert_allclose(shown[:, 0] - shown[:, 1], [shift, shift], rtol=1e-5)
    np.testing.assert_allclose(bias.served(logits), logits, rtol=1e-6)
    with pytest.raises(ConfigError, match="no examination curve"):
        bias.examination_curve()


def test_position_shifts_a_regression_task_and_has_no_curve() -> None:
    windows = windows_of(position=[1, 2, 1, 2], r=[-4.0, 3.0, 2.0, 1.0])
    statistics = position_statistics(windows, [STARS], ADDITIVE)["stars"]
    bias = PositionBias(ADDITIVE, STARS, statistics)
    assert at(bias, 2) == pytest.approx(0.3)
    bias.set_weights([np.array([[0, 0.1, -0.1, 0]], np.float32)])
    assert at(bias, 1) - at(bias, 2) == pytest.approx(2.0, rel=1e-5)
    with pytest.raises(ConfigError, match="no examination curve"):
        bias.examination_curve()


def test_exploration_does_not_go_with_the_additive_form() -> None:
    with pytest.raises(pydantic.ValidationError, match="set kind to 'pal'"):
        PositionConfig(kind="additive", learn_from="exploration")


# --- recovery of a planted truth

EXAMINED = np.array([1.0, 0.7, 0.5, 0.4])


def clicks_of(
    relevance: np.ndarray, position: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    rate = EXAMINED[position - 1] * relevance
    return (rng.random(len(rate)) < rate).astype(np.float32), position.astype(np.int32)


def trained_curve(
    config: PositionConfig, feature: np.ndarray, clicks: np.ndarray, position: np.ndarray, **more: Any
) -> np.ndarray:
    """The curve of a logistic regression on one feature, trained along with the tower."""
    windows = [{"position": position, "y": clicks, **more}]
    bias = PositionBias(config, CLICK, position_statistics(windows, [CLICK], config)["click"])
    weight, intercept = tf.Variable(0.0), tf.Variable(0.0)
    x = tf.constant(feature, tf.float32)
    optimizer = tf.keras.optimizers.Adam(0.03)

    @tf.function(autograph=False)
    def step() -> None:
        with tf.GradientTape() as tape:
            shown = bias(weight * x + intercept, position, training=True)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(clicks, shown))
        variables = [weight, intercept, *bias.trainable_variables]
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    for _ in range(200):
        step()
    return bias.examination_curve((weight * x + intercept).numpy())[0, 1:]


def sorted_log(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Relevance logits, clicks and positions of screens sorted by relevance."""
    rng = np.random.default_rng(seed)
    logit = -np.sort(-rng.normal(-0.5, 1.5, (10_000, 4)), axis=1).ravel()
    clicks, position = clicks_of(sigmoid(logit), np.tile([1, 2, 3, 4], 10_000), rng)
    return logit, clicks, position


def test_pal_separates_examination_from_relevance_that_the_body_can_see() -> None:
    logit, clicks, position = sorted_log(seed=1)
    naive = np.array([clicks[position == p].mean() for p in (1, 2, 3, 4)])
    assert naive[3] / naive[0] < 0.15
    # 30,000 rows each; at position 4 a standard error of .02.
    config = PositionConfig(kind="pal", max_position=4)
    np.testing.assert_allclose(trained_curve(config, logit, clicks, position), EXAMINED, atol=0.06)


def test_relevance_that_the_body_cannot_see_makes_the_curve_too_steep_and_exploration_mends_it() -> None:
    logit, clicks, position = sorted_log(seed=2)
    rng = np.random.default_rng(3)
    random_clicks, random_position = clicks_of(
        sigmoid(rng.normal(-0.5, 1.5, 40_000)), rng.integers(1, 5, 40_000), rng
    )
    clicks, position = np.r_[clicks, random_clicks], np.r_[position, random_position]
    blind = rng.normal(size=len(clicks))
    explores = np.r_[np.zeros(len(logit)), np.ones(40_000)]
    steep = trained_curve(PositionConfig(kind="pal", max_position=4), blind, clicks, position)
    assert steep[3] < 0.25
    config = PositionConfig(kind="pal", max_position=4, learn_from="exploration")
    mended = trained_curve(config, blind, clicks, position, exploration=explores)
    # 10,000 random rows each; smoothing draws the bend in towards its neighbours.
    np.testing.assert_allclose(mended, EXAMINED, atol=0.04)


def test_additive_tower_recovers_examination_on_random_screens_by_standardisation() -> None:
    rng = np.random.default_rng(4)
    logit = rng.normal(-0.5, 1.5, 60_000)
    clicks, position = clicks_of(sigmoid(logit), rng.integers(1, 5, len(logit)), rng)
    config = PositionConfig(kind="additive", max_position=4)
    np.testing.assert_allclose(trained_curve(config, logit, clicks, position), EXAMINED, atol=0.04)


# --- inverse propensities


def slow_weights(
    propensity: list[float], exploration: list[float], clip: float, normalise: bool
) -> list[float]:
    weights = [min(1 / p, clip) for p in propensity]
    if normalise:
        for bucket in (True, False):
            rows = [i for i, e in enumerate(exploration) if (e == 1) == bucket]
            mean = sum(weights[i] for i in rows) / max(len(rows), 1)
            for i in rows:
                weights[i] /= mean
    return weights


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("clip", [30.0, 1e9])
def test_weights_equal_slow_ones(clip: float, normalise: bool) -> None:
    rng = np.random.default_rng(5)
    propensity = rng.uniform(0.001, 1, 200).tolist()
    exploration = rng.choice([0.0, 1.0, NAN], 200).tolist()
    found = inverse_propensity_weights(propensity, exploration, clip, normalise)
    expected = slow_weights(propensity, exploration, clip, normalise)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-5)
    assert found.weights.dtype == np.float32
    assert found.num_clipped == sum(1 / p > clip for p in propensity)
    assert found.num_missing == 0
    assert found.effective_sample_size == pytest.approx(sum(expected) ** 2 / sum(w * w for w in expected))


def test_defaults_cut_nothing_and_have_mean_one() -> None:
    found = inverse_propensity_weights([0.5, 0.25, 1e-6])
    np.testing.assert_allclose(found.weights, np.array([2, 4, 1e6]) * 3 / 1_000_006, rtol=1e-6)
    assert found.num_clipped == 0


def test_rows_without_a_propensity_weigh_one_and_are_counted() -> None:
    found = inverse_propensity_weights(
        [0.5, NAN, 0.1, -1.0], clip=4.0, self_normalise=False, missing=[False, True, False, True]
    )
    assert found.weights.tolist() == [2.0, 1.0, 4.0, 1.0]
    assert (found.num_missing, found.num_clipped) == (2, 1)
    normalised = inverse_propensity_weights([0.5, NAN, 0.1], missing=[False, True, False])
    np.testing.assert_allclose(normalised.weights, [2 / 6, 1.0, 10 / 6], rtol=1e-6)


def test_weighted_mean_of_a_log_is_the_mean_over_uniform_actions() -> None:
    rng = np.random.default_rng(6)
    policy, reward = np.array([0.7, 0.2, 0.1]), np.array([1.0, 5.0, 9.0])
    action = rng.choice(3, 50_000, p=policy)
    assert reward[action].mean() == pytest.approx(2.6, abs=0.1)
    weights = inverse_propensity_weights(policy[action]).weights
    # Uniform actions get (1 + 5 + 9) / 3; the standard error is .03.
    assert np.average(reward[action], weights=weights) == pytest.approx(5.0, abs=0.1)


@pytest.mark.parametrize("wrong", [0.0, -0.5, 1.0001, NAN, math.inf])
def test_impossible_propensity_is_refused(wrong: float) -> None:
    with pytest.raises(DataError, match=r"probabilities in \(0, 1\]; found .* and 0 more"):
        inverse_propensity_weights([0.5, wrong, 1.0])


def test_wrong_shapes_and_clip_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"exploration \(1,\)"):
        inverse_propensity_weights([0.5, 0.5], exploration=[1.0])
    with pytest.raises(ShapeError, match=r"propensity \(1, 2\)"):
        inverse_propensity_weights([[0.5, 0.5]])
    with pytest.raises(ConfigError, match=r"clip is 0\.5"):
        inverse_propensity_weights([0.5], clip=0.5)


def test_effective_sample_size_runs_from_one_row_to_all() -> None:
    assert effective_sample_size([3.0] * 7) == pytest.approx(7)
    assert effective_sample_size([1e9, 1.0, 1.0]) == pytest.approx(1.0)
    # (1 + 3)^2 / (1 + 9)
    assert effective_sample_size([1.0, 3.0]) == pytest.approx(1.6)
    assert math.isnan(effective_sample_size([]))


# --- down-sampling of negatives


def keys(count: int) -> list[tf.Tensor]:
    return [tf.range(count) // 100, tf.strings.as_string(tf.range(count) % 100)]


def test_row_is_dropped_only_if_negative_in_every_binary_task() -> None:
    click = tf.constant([0.0, 1.0, 0.0, NAN] * 500)
    like = tf.constant([0.0, 0.0, 1.0, 0.0] * 500)
    found = sample_negatives([click, like], keys(2000), rate=0.2, seed=1)
    droppable = np.arange(2000) % 4 == 0
    assert found.keep.numpy()[~droppable].all()
    # 500 rows: a standard error of .018.
    assert found.keep.numpy()[droppable].mean() == pytest.approx(0.2, abs=0.06)
    np.testing.assert_allclose(found.weights, np.where(droppable, 5.0, 1.0))


def test_decision_does_not_depend_on_the_order_of_the_rows() -> None:
    label, key = tf.zeros([1000]), keys(1000)
    order = np.random.default_rng(7).permutation(1000)
    found = sample_negatives([label], key, 0.3, seed=1).keep.numpy()
    shuffled = sample_negatives([label], [tf.gather(k, order) for k in key], 0.3, seed=1).keep.numpy()
    np.testing.assert_array_equal(shuffled, found[order])


def test_lower_rate_keeps_a_subset_and_another_seed_others() -> None:
    label, key = tf.zeros([1000]), keys(1000)
    few = sample_negatives([label], key, 0.2, seed=1).keep.numpy()
    many = sample_negatives([label], key, 0.6, seed=1).keep.numpy()
    assert (few & ~many).sum() == 0 < (many & ~few).sum()
    assert (few != sample_negatives([label], key, 0.2, seed=2).keep.numpy()).mean() > 0.2


def test_columns_of_the_key_do_not_run_together() -> None:
    number = tf.strings.as_string(tf.range(400))
    # ("7", "11") and ("71", "1") are different rows.
    short = sample_negatives([tf.zeros([400])], [number, tf.fill([400], "11")], 0.5, seed=1).keep.numpy()
    long = sample_negatives([tf.zeros([400])], [number + "1", tf.fill([400], "1")], 0.5, seed=1).keep.numpy()
    assert (short != long).any()


def test_rate_of_one_keeps_everything_as_it_is() -> None:
    found = sample_negatives([tf.zeros([50])], keys(50), rate=1.0, seed=1)
    assert found.keep.numpy().all()
    assert (found.weights.numpy() == 1).all()


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, NAN])
def test_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        sample_negatives([tf.zeros([2])], keys(2), rate, seed=1)
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        correct_sampled_logit(tf.zeros([2]), rate)


def test_sampling_needs_a_binary_task_and_a_key() -> None:
    with pytest.raises(ConfigError, match="0 binary tasks and 2 key columns"):
        sample_negatives([], keys(2), 0.5, seed=1)
    with pytest.raises(ConfigError, match="1 binary tasks and 0 key columns"):
        sample_negatives([tf.zeros([2])], [], 0.5, seed=1)


def test_corrected_logit_is_the_published_formula() -> None:
    p, rate = np.array([0.02, 0.5, 0.97]), 0.1
    corrected = correct_sampled_logit(tf.constant(log_odds(p), tf.float32), rate)
    np.testing.assert_allclose(sigmoid(corrected), p / (p + (1 - p) / rate), rtol=1e-5)


def logistic_fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Slope and intercept of a weighted logistic regression."""

    def loss(theta: np.ndarray) -> float:
        logit = theta[0] * x + theta[1]
        return float((weights * (np.logaddexp(0, logit) - y * logit)).sum() / weights.sum())

    return scipy.optimize.minimize(loss, np.zeros(2), method="BFGS").x


def test_both_corrections_recover_a_known_model_and_no_correction_does_not() -> None:
    rng = np.random.default_rng(8)
    x = rng.normal(size=200_000)
    y = (rng.random(len(x)) < sigmoid(1.0 * x - 3.0)).astype(np.float32)
    sample = sample_negatives([tf.constant(y)], [tf.range(len(x))], rate=0.1, seed=1)
    keep, weights = sample.keep.numpy(), sample.weights.numpy()
    assert keep.mean() < 0.2
    weighted = logistic_fit(x[keep], y[keep], weights[keep])
    np.testing.assert_allclose(weighted, [1.0, -3.0], atol=0.06)
    slope, intercept = logistic_fit(x[keep], y[keep], np.ones(keep.sum()))
    assert intercept > -1.0
    corrected = correct_sampled_logit(tf.constant([intercept], tf.float32), 0.1).numpy()[0]
    np.testing.assert_allclose([slope, corrected], [1.0, -3.0], atol=0.06)


def test_weights_keep_every_task_calibrated_where_the_logit_correction_cannot() -> None:
    rng = np.random.default_rng(9)
    count = 200_000
    click = (rng.random(count) < 0.3).astype(np.float32)
    like = ((rng.random(count) < 0.2) & (click == 1)).astype(np.float32)
    watch = rng.exponential(np.where(click == 1, 30.0, 2.0))
    sample = sample_negatives([tf.constant(click), tf.constant(like)], [tf.range(count)], rate=0.1, seed=1)
    keep, weights = sample.keep.numpy(), sample.weights.numpy()
    for label in (click, like, watch):
        assert np.average(label[keep], weights=weights[keep]) == pytest.approx(label.mean(), rel=0.03)
    # A model that knows only the rate among the kept rows, corrected: right for clicks, wrong for likes.
    for label, is_right in ((click, True), (like, False)):
        logit = tf.constant(log_odds(label[keep].mean()), tf.float32)
        rate = sigmoid(correct_sampled_logit(logit, 0.1))
        assert bool(rate == pytest.approx(label.mean(), rel=0.05)) is is_right
