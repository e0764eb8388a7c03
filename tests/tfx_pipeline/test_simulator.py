"""The simulator: what it writes is consistent, and the log follows its truth and propensities."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from schema.contract import load_dataset_spec
from schema.errors import ConfigError, DataError
from schema.tables import prepare_tables
from tfx_pipeline.datasets.simulator import (
    DEFAULT,
    TINY,
    SimulatorConfig,
    choose_screen,
    simulate,
    true_click_probability,
)
from tfx_pipeline.datasets.simulator_world import (
    LOG_END_UNIX_S,
    MAX_PLAYS,
    draw_watch_time_s,
    expected_watch_time_s,
)

# Half of the requests explore, so that the random bucket is large enough for tight tolerances.
EXPLORING = dataclasses.replace(
    TINY, num_users=1_000, num_items=200, requests_per_user_day=1.0, exploration_fraction=0.5, seed=3
)


def _mean(values: pl.Series) -> float:
    return float(values.to_numpy().mean())


class Simulation:
    """The tables of one simulation."""

    def __init__(self, folder: Path, config: SimulatorConfig) -> None:
        simulate(config, folder)
        self.folder = folder
        self.log, self.users, self.items, self.truth, self.examination = (
            pl.read_parquet(folder / f"{name}.parquet")
            for name in ("interactions", "users", "items", "truth/impressions", "truth/examination")
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    return Simulation(tmp_path_factory.mktemp("tiny") / "data", TINY)


@pytest.fixture(scope="module")
def exploring(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    return Simulation(tmp_path_factory.mktemp("exploring") / "data", EXPLORING)


def test_same_seed_writes_identical_bytes_and_another_seed_does_not(tiny: Simulation, tmp_path: Path) -> None:
    simulate(TINY, tmp_path / "again")
    simulate(dataclasses.replace(TINY, seed=TINY.seed + 1), tmp_path / "other")
    names = sorted(str(p.relative_to(tiny.folder)) for p in tiny.folder.rglob("*.parquet"))
    assert names == [
        "interactions.parquet",
        "items.parquet",
        "truth/examination.parquet",
        "truth/impressions.parquet",
        "truth/items.parquet",
        "truth/users.parquet",
        "users.parquet",
    ]
    for name in names:
        assert (tiny.folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert (tiny.folder / names[0]).read_bytes() != (tmp_path / "other" / names[0]).read_bytes()


def test_contract_tables_are_made_without_a_warning(tiny: Simulation, tmp_path: Path) -> None:
    tables = prepare_tables(load_dataset_spec("simulated"), tiny.folder, tmp_path)
    rows = pl.read_parquet(tables / "interactions.parquet").group_by("split").len()
    assert dict(rows.iter_rows()).keys() == {"train", "eval", "test"}
    assert '"warnings": []' in (tables / "summary.json").read_text()


def test_ids_are_unique_and_every_reference_resolves(tiny: Simulation) -> None:
    assert tiny.users["user_id"].is_unique().all() and len(tiny.users) == TINY.num_users
    assert tiny.items["item_id"].is_unique().all() and len(tiny.items) == TINY.num_items
    assert tiny.log.select("request_id", "position").is_unique().all()
    assert tiny.log.select("user_id", "event_time").is_unique().all()
    assert tiny.log.join(tiny.users, on="user_id", how="anti").is_empty()
    assert tiny.log.join(tiny.items, on="item_id", how="anti").is_empty()
    creators = set(tiny.items["creator_id"])
    subscribed = set(tiny.users["subscribed_creators"].explode().drop_nulls())
    assert subscribed & creators


def test_rates_are_those_of_a_real_platform(tiny: Simulation) -> None:
    assert 5_000 < len(tiny.log) < 9_000
    assert 0.33 < _mean(tiny.log["is_click"]) < 0.48
    assert 0.008 < _mean(tiny.log["is_like"]) < 0.03
    assert 0.0002 < _mean(tiny.log["is_not_interested"]) < 0.004
    assert 50 < np.median(tiny.items["duration_s"]) < 95
    assert 2.5 < np.median(tiny.log["watch_time_s"]) < 10
    assert 0.03 < _mean(tiny.log["exploration"]) < 0.08
    per_user = np.sort(tiny.log.group_by("user_id").len()["len"])
    assert per_user[-len(per_user) // 10 :].sum() > 0.25 * per_user.sum()  # few people watch much


def test_default_has_the_documented_size() -> None:
    expected_requests = DEFAULT.num_users * DEFAULT.num_days * DEFAULT.requests_per_user_day
    assert 20_000 < expected_requests < 30_000  # 4 to 10 videos each: 150 to 200 thousand impressions


def test_nothing_happens_before_its_cause(tiny: Simulation) -> None:
    rows = tiny.log.join(tiny.users, on="user_id").join(tiny.items, on="item_id")
    assert (rows["event_time"] >= rows["upload_time"]).all()
    assert (rows["event_time"] >= rows["register_time"]).all()
    assert (tiny.log["event_time"] >= TINY.log_start_unix_s).all()
    assert (tiny.log["event_time"] < LOG_END_UNIX_S).all()
    assert tiny.log["event_time"].is_sorted()
    # The next video starts only after the last one was watched, in a screen and from screen to screen.
    ordered = tiny.log.sort("user_id", "event_time")
    idle = ordered.select(
        (pl.col("event_time").shift(-1) - pl.col("event_time") - pl.col("watch_time_s")).over("user_id")
    )
    assert (idle.to_series().drop_nulls() >= 0).all()


def test_positions_run_from_one_without_gaps_and_a_session_repeats_no_item(tiny: Simulation) -> None:
    screens = tiny.log.sort("event_time").group_by("request_id", maintain_order=True)
    for positions in screens.agg("position")["position"]:
        assert positions.to_list() == list(range(1, len(positions) + 1))
    sessions = tiny.log.group_by("request_id").agg(pl.col("session_id", "surface", "user_id").n_unique())
    assert sessions.drop("request_id").max().row(0) == (1, 1, 1)
    assert tiny.log.select("session_id", "item_id").is_unique().all()


def test_a_screen_is_filled_at_one_time_when_its_first_video_is_shown(tiny: Simulation) -> None:
    screens = tiny.log.group_by("request_id").agg(
        pl.col("request_time").n_unique().alias("times"),
        pl.col("request_time").first(),
        pl.col("event_time").min().alias("first_shown"),
    )
    assert screens["times"].max() == 1
    assert (screens["request_time"] == screens["first_shown"]).all()
    # The contract goes by it, so no row's history holds what became of the rows above on its screen.
    spec = load_dataset_spec("simulated")
    assert spec.interactions.columns["event_time_unix_s"].column == "request_time"


def test_only_searches_carry_tokens(tiny: Simulation) -> None:
    by_surface = tiny.log.group_by("surface").agg(
        pl.col("search_tokens").is_null().all().alias("none"),
        pl.col("search_tokens").list.len().min().alias("least"),
    )
    assert dict(zip(by_surface["surface"], by_surface["none"], strict=True)) == {
        "home": True,
        "search": False,
    }
    assert by_surface.filter(pl.col("surface") == "search")["least"].item() >= 1


def test_a_click_is_examined_and_relevant_and_reactions_follow_from_it(tiny: Simulation) -> None:
    log, truth = tiny.log, tiny.truth
    keys = ["request_id", "position", "user_id", "item_id"]
    assert log.select(keys).equals(truth.select(keys))
    clicked = log["is_click"] == 1
    assert (clicked == (truth["examined"] & truth["relevant"])).all()
    assert clicked.filter(log["is_like"] == 1).all()
    rejected = log["is_not_interested"] == 1
    assert rejected.any() and not clicked.filter(rejected).any() and truth["examined"].filter(rejected).all()


def test_watch_time_stays_within_its_bounds(tiny: Simulation) -> None:
    clicked = tiny.log.filter(pl.col("is_click") == 1)
    others = tiny.log.filter(pl.col("is_click") == 0)
    assert (clicked["watch_time_s"] > 0).all()
    assert (clicked["watch_time_s"] <= MAX_PLAYS * clicked["duration_s"] + 0.001).all() and MAX_PLAYS < 3
    assert (others["watch_time_s"] <= 7.15).all() and 0.1 < _mean(others["watch_time_s"] == 0) < 0.25


def test_cold_items_and_cold_users_appear_in_the_test_window(tiny: Simulation) -> None:
    split = load_dataset_spec("simulated").split
    assert split.train_until is not None and split.eval_until is not None
    train = tiny.log.filter(pl.col("event_time") < int(split.train_until.timestamp()))
    test = tiny.log.filter(pl.col("event_time") >= int(split.eval_until.timestamp()))
    for key in ("item_id", "user_id"):
        cold = test.join(train, on=key, how="anti")
        assert 0 < len(cold) < 0.3 * len(test), key


def test_examination_curve_is_recovered_from_the_random_bucket(exploring: Simulation) -> None:
    """On random screens the videos are alike at all positions, so click rates differ by examination alone."""
    random = exploring.log.filter((pl.col("exploration") == 1) & (pl.col("surface") == "home"))
    rate = random.group_by("position").agg(pl.col("is_click").mean(), pl.len()).sort("position")
    curve = exploring.examination.filter(pl.col("surface") == "home")["examination_probability"].to_numpy()
    assert curve[0] == 1 and (np.diff(curve) < 0).all()
    ratio = (rate["is_click"] / rate["is_click"][0]).to_numpy()
    # Delta method, doubled by hand to 3.5 standard errors: clicks of one user are correlated.
    variance = (1 - rate["is_click"]) / (rate["is_click"] * rate["len"])
    error = ratio * np.sqrt(variance.to_numpy() + variance[0])
    assert (np.abs(ratio - curve)[1:] < 3.5 * error[1:]).all()
    assert np.abs(ratio - curve).max() < 0.12 and ratio[-1] < 0.8


def test_click_probability_and_expected_watch_time_are_calibrated(exploring: Simulation) -> None:
    log, truth = exploring.log, exploring.truth
    assert _mean(truth["examined"]) == pytest.approx(_mean(truth["examination_probability"]), abs=0.005)
    decile = (truth["click_probability"].rank() * 10 / len(truth)).floor().clip(0, 9)
    table = pl.DataFrame(
        {
            "decile": decile,
            "predicted": truth["click_probability"] * truth["examination_probability"],
            "clicked": log["is_click"].cast(pl.Float64),
        }
    )
    means = table.group_by("decile").mean()
    assert len(means) == 10
    assert ((means["predicted"] - means["clicked"]).abs() < 0.02).all()  # 4 standard errors of 8,000 clicks
    assert _mean(log["watch_time_s"]) == pytest.approx(_mean(truth["expected_watch_time_s"]), rel=0.02)


def test_expected_watch_time_is_the_mean_of_drawn_ones() -> None:
    rng = np.random.default_rng(0)
    for duration, patience, click in itertools.product((5.0, 60.0, 500.0), (2.0, 4.0), (0.0, 0.4, 1.0)):
        n = 40_000
        clicked = rng.random(n) < click
        drawn = draw_watch_time_s(clicked, np.full(n, patience), np.full(n, duration), rng)
        expected = expected_watch_time_s(np.array([click]), np.array([patience]), np.array([duration]))[0]
        assert drawn.mean() == pytest.approx(expected, abs=4 * drawn.std() / np.sqrt(n))


def test_true_click_probability_answers_for_pairs_that_were_and_were_not_shown(exploring: Simulation) -> None:
    home = exploring.log.with_columns(truth=exploring.truth["click_probability"]).filter(
        pl.col("surface") == "home"
    )
    # A session that runs past midnight keeps the interests of the day it began: leave the first hour out.
    home = home.filter((pl.col("event_time") - EXPLORING.log_start_unix_s) % 86_400 > 3_600)
    told = true_click_probability(
        exploring.folder / "truth", home["user_id"], home["item_id"], home["event_time"]
    )
    np.testing.assert_allclose(told, home["truth"].to_numpy(), rtol=1e-6)
    unseen = true_click_probability(exploring.folder / "truth", ["u00000", "u00001"], ["v00007"] * 2, 0)
    assert unseen.shape == (2,) and unseen[0] != unseen[1] and ((unseen > 0) & (unseen < 1)).all()
    with pytest.raises(DataError, match="v99999"):
        true_click_probability(exploring.folder / "truth", ["u00000"], ["v99999"], 0)


def test_exploration_propensity_is_one_over_the_items_left(exploring: Simulation) -> None:
    """Eligible are the videos uploaded by the start of the screen that the user did not see that day."""
    uploads = np.sort(exploring.items["upload_time"].to_numpy())
    log = exploring.log.with_columns(
        start=pl.col("event_time").min().over("request_id"),
    )
    # The first screen of a user's day: more than 25 h after the one before, so nothing was shown that day.
    screens = log.group_by("user_id", "request_id").agg(pl.col("start").first()).sort("user_id", "start")
    first = screens.filter(
        (pl.col("start") - pl.col("start").shift().over("user_id")).fill_null(10**6) > 90_000
    )
    rows = log.join(first.select("request_id"), on="request_id").filter(pl.col("exploration") == 1)
    assert len(rows) > 3_000
    available = np.searchsorted(uploads, rows["start"].to_numpy(), side="right")
    np.testing.assert_allclose(
        rows["propensity"].to_numpy(), 1 / (available - rows["position"].to_numpy() + 1), rtol=1e-9
    )


def test_propensities_of_chosen_screens_match_how_often_they_come_up() -> None:
    """Against Plackett-Luce probabilities multiplied out by hand, and against the frequencies of draws."""
    weights = np.array([4.0, 2.0, 1.0, 1.0, 8.0])
    eligible = np.array([True, True, True, True, False])
    draws = 200_000
    score = np.broadcast_to(np.log(weights), (draws, 5))
    screens, propensity = choose_screen(
        score, np.broadcast_to(eligible, (draws, 5)), 3, np.random.default_rng(0)
    )
    frequency = pl.DataFrame(screens, schema=["a", "b", "c"]).group_by("a", "b", "c").len()
    counted = {(a, b, c): n / draws for a, b, c, n in frequency.iter_rows()}
    orders = list(itertools.permutations(range(4), 3))
    assert set(counted) <= set(orders)
    for order in orders:
        left, steps = 8.0, []
        for item in order:
            steps.append(weights[item] / left)
            left -= weights[item]
        expected = np.prod(steps)
        error = np.sqrt(expected * (1 - expected) / draws)
        assert counted[order] == pytest.approx(expected, abs=4.5 * error)
        np.testing.assert_allclose(propensity[(screens == order).all(axis=1)][0], steps, rtol=1e-12)


def test_inverse_propensity_of_the_old_policy_estimates_the_random_click_rate(exploring: Simulation) -> None:
    """First positions, reweighted by 1/propensity, are a uniform draw of the catalogue."""
    first = exploring.log.with_columns(truth=exploring.truth["click_probability"]).filter(
        (pl.col("position") == 1) & (pl.col("surface") == "home")
    )
    policy = first.filter(pl.col("exploration") == 0)
    random = _mean(first.filter(pl.col("exploration") == 1)["truth"])
    estimate = np.average(policy["truth"], weights=1 / policy["propensity"])
    assert _mean(policy["truth"]) > random + 0.08  # the old policy is much better than chance
    assert estimate == pytest.approx(random, abs=0.05)


@pytest.mark.parametrize("inside", [True, False], ids=["folder with a file", "a file"])
def test_existing_data_are_never_overwritten(tmp_path: Path, inside: bool) -> None:
    target = tmp_path / "data"
    kept = target / "kept.txt" if inside else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(DataError, match="not an empty folder"):
        simulate(TINY, target)
    assert kept.read_text() == "precious"


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = pl.DataFrame.write_parquet

    def write_until_truth(table: pl.DataFrame, path: Path) -> None:
        if path.parent.name == "truth":
            raise KeyboardInterrupt
        write(table, path)

    monkeypatch.setattr(pl.DataFrame, "write_parquet", write_until_truth)
    with pytest.raises(KeyboardInterrupt):
        simulate(TINY, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_users", 0), ("num_items", 99), ("num_topics", 25), ("exploration_fraction", 1.5), ("num_days", 1)],
)
def test_a_value_out_of_range_is_refused_with_its_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{field} must be between .* got {value}"):
        dataclasses.replace(TINY, **{field: value})


def test_the_smallest_catalogue_still_fills_the_busiest_day(tmp_path: Path) -> None:
    config = SimulatorConfig(num_users=5, num_items=100, num_creators=1, num_topics=2, num_days=2, seed=0)
    simulate(dataclasses.replace(config, requests_per_user_day=6), tmp_path / "data")
    assert (pl.read_parquet(tmp_path / "data" / "interactions.parquet")["propensity"] > 0).all()
