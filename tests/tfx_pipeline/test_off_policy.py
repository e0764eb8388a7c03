"""The ranker's first choice on uniformly random screens, from tables to the printed estimate."""

import json
import types

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from tfx.types import standard_artifacts

from schema.contract import load_dataset_spec
from schema.errors import ConfigError, DataError
from tfx_pipeline import off_policy, recommend
from tfx_pipeline.cli import main
from tfx_pipeline.components.off_policy import OffPolicy, OffPolicyFacts
from trainer.off_policy import IPS, read_policies

SPEC = load_dataset_spec("simulated")
NUM_USERS = 60


def impression(user, position, time, **change):
    left = 900 - position + 1
    row = {
        "user_id": user,
        "item_id": f"v{time % 7}",
        "event_time_unix_s": time,
        "surface": "home",
        "position": position,
        "exploration": 1.0,
        "propensity": 1 / left,
        "click": 0.0,
        "row_number": time,
        "split": "test",
    }
    return row | change


def write(folder, rows):
    table = pl.DataFrame(rows).with_columns(pl.col("propensity", "exploration", "click").cast(pl.Float32))
    table.write_parquet(folder / "interactions.parquet")
    return folder


def test_screens_are_cut_where_positions_start_again_and_get_the_time_of_their_start(tmp_path):
    rows = [
        # Two screens of one user, the second on search; a screen of one row; another user; and what is no
        # exploration, no test row, or has no label.
        impression("u1", 1, 10),
        impression("u1", 2, 14),
        impression("u1", 1, 20, surface="search"),
        impression("u1", 2, 25, surface="search"),
        impression("u1", 4, 26, surface="search"),
        impression("u1", 1, 30),
        impression("u2", 3, 12),
        impression("u2", 4, 13),
        impression("u2", 5, 15, surface="search"),
        impression("u3", 1, 11, exploration=0.0),
        impression("u3", 2, 12, exploration=0.0),
        impression("u4", 1, 11, split="eval"),
        impression("u4", 2, 12, split="eval"),
        impression("u5", 1, 11, click=None),
        impression("u5", 2, 12),
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    found = off_policy.exploration_screens(write(tmp_path, [rows[i] for i in order]), SPEC, "click")
    assert found.select("user_id", "position", "screen", "event_time_unix_s", "row_number").rows() == [
        ("u1", 1, 0, 10, 0),
        ("u1", 2, 0, 10, 1),
        ("u1", 1, 1, 20, 2),
        ("u1", 2, 1, 20, 3),
        ("u1", 4, 1, 20, 4),
        ("u2", 3, 2, 12, 5),
        ("u2", 4, 2, 12, 6),
    ]


def test_propensities_of_another_policy_are_refused(tmp_path):
    rows = [impression("u1", 1, 10), impression("u1", 2, 11, propensity=0.3)]
    with pytest.raises(DataError, match="1 of 1 screens"):
        off_policy.exploration_screens(write(tmp_path, rows), SPEC, "click")


def test_a_log_without_exploration_or_positions_is_refused(tmp_path):
    with pytest.raises(DataError, match="no uniformly random screens"):
        off_policy.exploration_screens(
            write(tmp_path, [impression("u1", 1, 10, exploration=0.0)]), SPEC, "click"
        )
    with pytest.raises(DataError, match="does not map exploration and position"):
        off_policy.exploration_screens(tmp_path, load_dataset_spec("movielens-1m"), "click")


def rows_of(num_users):
    """A screen of two rows for each user."""
    rows = [impression(f"u{user}", 1, 100 + user) for user in range(num_users)]
    return rows + [impression(f"u{user}", 2, 200 + user, click=float(user % 2)) for user in range(num_users)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose ranker likes the second row of each screen of two; every second of these is clicked."""
    write(tmp_path, rows_of(NUM_USERS))
    log = pl.DataFrame({"item_id": [f"v{i}" for i in range(7)], "click": [1.0] * 7})

    def predict(table, knowledge, spec, ranker, on_progress):
        on_progress(len(table))
        second = (table["position"].to_numpy() == 2).astype(np.float32)
        # Negative feedback speaks for what has the least of it.
        disliked = {"completion": 0 * second, "dislike": -second}
        return {"click": second, "like": -second, "watch_time": 0 * second, "score": second, **disliked}

    monkeypatch.setattr(off_policy, "predict_rows", predict)
    monkeypatch.setattr(off_policy, "load_ranker", lambda folder, spec: None)
    monkeypatch.setattr(recommend, "serving_folder", lambda run, paths, kind: tmp_path)
    monkeypatch.setattr(off_policy, "read_knowledge", lambda *args, **given: types.SimpleNamespace(log=log))
    examples = types.SimpleNamespace(max_positives_per_user=10)
    config = types.SimpleNamespace(dataset=SPEC, examples=examples)
    result = types.SimpleNamespace(config=config, tables_dir=str(tmp_path))
    monkeypatch.setattr("tfx_pipeline.run_result.read_run", lambda output_dir: result)
    return tmp_path


def evaluate(run, **change):
    settings = {"max_positives_per_user": 10, "reward": "click"} | change
    return off_policy.evaluate_ranker(run, SPEC, run, **settings)


def test_value_of_the_first_choice_worked_by_hand(run):
    found = evaluate(run)
    tasks = ["click", "like", "watch_time", "completion", "dislike"]
    assert list(found.estimates) == ["score", *tasks, "popularity"]
    assert (found.refused, found.absent) == ({}, "")
    # Half of the second rows were clicked, no first row, and a constant task picks either with half.
    values = {name: estimate.values[IPS].value for name, estimate in found.estimates.items()}
    assert values == pytest.approx(
        {"score": 0.5, "click": 0.5, "like": 0.0, "dislike": 0.5}
        | dict.fromkeys(("watch_time", "completion", "popularity"), 0.25)
    )
    of_score = found.estimates["score"]
    assert of_score.logged.value == pytest.approx(0.25)
    assert of_score.gains[IPS].value == pytest.approx(0.25)
    assert of_score.support.effective_samples == pytest.approx(NUM_USERS)
    # A tenth of the picks are random: .9 * .5 + .1 * .25.
    assert evaluate(run, epsilon=0.1).estimates["score"].values[IPS].value == pytest.approx(0.475)


def test_a_policy_with_poor_support_or_without_numbers_is_refused_and_the_others_are_not(run, monkeypatch):
    # A choice between two rows of 40 users weighs as much as 40 rows, a random pick as much as all 80.
    write(run, rows_of(40))
    predict = off_policy.predict_rows

    def with_gaps(table, *args):
        found = predict(table, *args)
        return found | {"like": np.where(np.arange(len(table)) < 3, np.nan, found["like"])}

    monkeypatch.setattr(off_policy, "predict_rows", with_gaps)
    found = evaluate(run)
    assert set(found.estimates) == {"watch_time", "completion", "popularity"}
    assert set(found.refused) == {"score", "click", "like", "dislike"}
    assert "80 rows weigh as much as 40.0 of equal weight, fewer than 50" in found.refused["score"]
    assert found.refused["like"] == "3 of 80 predictions of like are NaN or infinite"


def test_unknown_reward_is_refused_with_the_labels(run):
    with pytest.raises(ConfigError, match="click, like"):
        evaluate(run, reward="clicks")


def test_command_prints_every_policy_and_writes_json(run, tmp_path):
    out = tmp_path / "out" / "off-policy.json"
    result = CliRunner().invoke(main, ["off-policy", "--output-dir", str(tmp_path), "--json", str(out)])
    assert result.exit_code == 0, result.output
    for text in ("score", "popularity", "chance", "0.25", "120 impressions of 60 users"):
        assert text in result.output
    written = json.loads(out.read_text())
    assert written["estimates"]["score"]["values"]["ips"]["value"] == pytest.approx(0.5)


def test_command_fails_with_the_reason_where_every_policy_is_refused(run):
    write(run, rows_of(20))
    result = CliRunner().invoke(main, ["off-policy", "--output-dir", str(run)])
    assert result.exit_code == 1
    assert "40 rows weigh as much as 20.0 of equal weight, fewer than 50" in result.output


@pytest.mark.parametrize("dataset", ["simulated", "movielens-1m"])
def test_the_component_writes_what_it_found_or_why_there_is_nothing(run, dataset):
    folder = run / "artifact"
    model = standard_artifacts.Model()
    model.uri = str(run)
    policies = OffPolicyFacts()
    policies.uri = str(folder)
    properties = {
        "tables_dir": str(run),
        "dataset": load_dataset_spec(dataset).model_dump_json(),
        "max_positives_per_user": 10,
        "code_version": "1",
    }
    OffPolicy.EXECUTOR_SPEC.executor_class().Do(
        {"ranking_model": [model]}, {"policies": [policies]}, properties
    )
    found = read_policies(folder)
    if dataset == "simulated":
        assert found == evaluate(run)
    else:
        assert found.estimates == {}
        assert "dataset movielens-1m does not map exploration and position" in found.absent
