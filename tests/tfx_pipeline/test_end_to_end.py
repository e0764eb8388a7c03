"""The whole product on a tiny world: a fresh run, an identical one, worse models; then serving."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scann  # noqa: F401  registers the ops of the index
import tensorflow as tf
from click.testing import CliRunner

from schema.contract import DatasetSpec
from serving.client import RecommenderClient
from serving.process import ModelServerProcess
from tests.tfx_pipeline import taste_world
from tests.tfx_pipeline.taste_run import Run, run
from tests.warmup import expected_sizes, warmed_up_sizes
from tfx_pipeline import refresh
from tfx_pipeline.cli import main
from tfx_pipeline.config import BUNDLES, MODELS, RunPaths
from tfx_pipeline.gates import Verdict, read_validation
from tfx_pipeline.outcome import read_artifact_uris
from tfx_pipeline.recommend import titles, user_state
from tfx_pipeline.report.facts import read_facts
from tfx_pipeline.run_result import RunResult, read_run
from tfx_pipeline.user_states import padded, query_arrays, ranking_arrays
from trainer import metrics
from trainer.comparison import PREDICTIONS_FILE, read_comparison
from trainer.off_policy import read_policies
from trainer.waterfall import read_waterfall

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

REPO = Path(__file__).parents[2]
# Nothing is learned: as good as the first random weights.
UNTRAINED = [
    f"--set={model}.{setting}" for model in MODELS for setting in ("learning_rate=0", "max_epochs=1")
]
USER, STRANGER = "u7", "nobody-has-seen"


@pytest.fixture(scope="module")
def again(config: Path, paths: RunPaths, fresh: Run) -> Run:
    return run(config, paths)


@pytest.fixture(scope="module")
def worse(config: Path, paths: RunPaths, again: Run) -> Run:
    return run(config, paths, *UNTRAINED)


def test_a_fresh_run_pushes_both_models(fresh: Run, paths: RunPaths) -> None:
    assert (fresh.exit_code, fresh.errors) == (0, "")
    assert fresh.result.blessed == {"retrieval": True, "ranking": True}
    assert fresh.reused == set()
    for model in MODELS:
        (version,) = fresh.versions[model]
        assert fresh.result.pushed[model] == version
        assert f"blessed and pushed: {model} version {version}" in fresh.output
        folder = paths.serving_models / model / version
        assert (folder / "saved_model.pb").stat().st_size
        assert (folder / "variables" / "variables.index").is_file()


def test_all_bundles_of_a_run_have_one_version(fresh: Run, paths: RunPaths) -> None:
    (version,) = set(fresh.result.pushed.values())
    assert {name: os.listdir(paths.serving_models / name) for name in BUNDLES} == {
        name: [version] for name in BUNDLES
    }


def warmed_up(paths: RunPaths, version: str) -> dict[str, dict[str, list[int]]]:
    return {name: warmed_up_sizes(paths.serving_models / name / version) for name in BUNDLES}


# By bundle and signature.
OF_ALL_SIZES = {name: expected_sizes(name) for name in BUNDLES}


def test_every_bundle_is_warmed_up_in_all_batch_sizes_that_a_server_may_make(
    fresh: Run, paths: RunPaths
) -> None:
    assert warmed_up(paths, next(iter(fresh.result.pushed.values()))) == OF_ALL_SIZES


def test_a_fresh_run_leaves_everything_below_its_folder_and_no_leftovers(fresh: Run, paths: RunPaths) -> None:
    for path in (paths.tables, paths.pipeline_root, paths.metadata, paths.log_file):
        assert path.exists()
    assert Path(fresh.result.report).is_absolute()
    assert Path(fresh.result.tables_dir).is_relative_to(paths.tables)
    assert f"report: {fresh.result.report}" in fresh.output
    assert not list(paths.output_dir.rglob("*.partial"))


def test_both_models_beat_their_baselines(fresh: Run) -> None:
    model, baselines = fresh.metrics["model"], fresh.metrics["baselines"]
    # One user in four shares a taste: a list of 50 from 160 videos holds a third of them by chance.
    assert model["retrieval/recall_at_50"] > baselines["popularity"]["retrieval/recall_at_50"] + 0.15
    assert model["retrieval/recall_at_50"] > baselines["recent_popularity"]["retrieval/recall_at_50"] + 0.15
    assert model["ranking/click/auc"] > baselines["item_mean"]["ranking/click/auc"] + 0.15
    assert model["ranking/watch_time/xauc"] > baselines["item_mean"]["ranking/watch_time/xauc"] + 0.1


def test_the_leakage_linter_passes_the_run(fresh: Run, paths: RunPaths) -> None:
    result = CliRunner().invoke(
        main, ["lint-leakage", "--examples", "50", "--no-inflation", "--output-dir", str(paths.output_dir)]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(paths.leakage_file.read_text())["passed"]


def test_the_waterfall_of_the_run_and_that_of_the_command_are_the_same(fresh: Run, paths: RunPaths) -> None:
    result = CliRunner().invoke(main, ["waterfall", "--output-dir", str(paths.output_dir)])
    assert result.exit_code == 0, result.output
    found = read_waterfall(Path(read_artifact_uris(paths.metadata)["FunnelWaterfall", "waterfall"]))
    assert f"{found.whole.num_positives:,} positives of {found.num_users:,} of" in result.output
    assert f"{found.whole.shown / found.whole.num_positives:.1%}" in result.output


def test_a_log_without_random_screens_costs_the_off_policy_section_alone(fresh: Run, paths: RunPaths) -> None:
    found = read_policies(Path(read_artifact_uris(paths.metadata)["OffPolicy", "policies"]))
    assert "does not map exploration and position" in found.absent
    facts = read_facts(paths.report / "metrics.json")
    assert facts.missing["off_policy"] == found.absent


def test_every_gate_of_a_fresh_run_is_told_with_its_verdict_and_reason(fresh: Run, paths: RunPaths) -> None:
    artifacts = read_artifact_uris(paths.metadata)
    for model in MODELS:
        found = read_validation(Path(artifacts[f"ModelValidator.{model}", "blessing"]))
        assert (found.blessed, found.reason) == (True, "")
        # There is no earlier model, no earlier run, no objective and no new item: all else was judged.
        skipped = {gate.kind for gate in found.gates if gate.verdict is Verdict.NOT_APPLIED}
        assert {"no_worse", "drift", "latency"} <= skipped <= {"no_worse", "drift", "latency", "index"}
        passed = {gate.kind for gate in found.gates if gate.verdict is Verdict.PASSED}
        assert {"value", "must_beat", "agreement", "collapse", "serving", "anomalies", "drift"} <= passed
        assert {gate.kind for gate in found.gates} - passed == {"no_worse", "latency"}


def test_the_numbers_of_a_comparison_can_be_worked_out_from_its_tables(fresh: Run, paths: RunPaths) -> None:
    artifacts = read_artifact_uris(paths.metadata)
    folders = {model: Path(artifacts[f"Comparison.{model}", "comparison"]) for model in MODELS}
    comparisons = {model: read_comparison(folder) for model, folder in folders.items()}
    tables = {model: pl.read_parquet(folder / PREDICTIONS_FILE) for model, folder in folders.items()}

    recall = comparisons["retrieval"].whole.metric("retrieval/recall_at_50")
    assert recall is not None and recall.low < recall.value < recall.high
    for name, value in (("candidate", recall.value), ("ials", recall.against["ials"].value)):
        found = pl.col(name).is_between(1, 50).cast(pl.Float64)
        by_user = tables["retrieval"].group_by("user_id").agg(found.mean())
        assert by_user[name].mean() == pytest.approx(value)
    auc = comparisons["ranking"].whole.metric("ranking/click/auc")
    assert auc is not None
    rows = tables["ranking"]
    for name, value in (("candidate", auc.value), ("lightgbm", auc.against["lightgbm"].value)):
        assert metrics.auc(rows["label_click"].to_numpy(), rows[f"{name}/click"].to_numpy()) == pytest.approx(
            value
        )
    assert comparisons["ranking"].absent == {"last_blessed": "no model was blessed before"}
    slices = {part.slice for part in comparisons["ranking"].slices}
    assert {(), (("surface", "home"),), (("user_type", "cold"),), (("item_popularity", "tail"),)} <= slices
    assert any(len(key) == 2 for key in slices)


def test_evaluate_finds_what_the_run_found(fresh: Run, paths: RunPaths, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [
        "evaluate",
        "--model",
        "ranking",
        "--json",
        str(figures),
        "--output-dir",
        str(paths.output_dir),
    ]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "ranking: passes every gate" in result.output
    folder = Path(read_artifact_uris(paths.metadata)["Comparison.ranking", "comparison"])
    found = json.loads(figures.read_text())["ranking"]["comparison"]["slices"][0]["metrics"]
    for metric, again in zip(read_comparison(folder).whole.metrics, found, strict=True):
        assert (again["key"], again["count"]) == (metric.key, metric.count)
        assert again["value"] == pytest.approx(metric.value, abs=1e-6)


def test_an_identical_run_reuses_all_that_takes_time(fresh: Run, again: Run) -> None:
    assert (again.exit_code, again.errors) == (0, "")
    everything = {timing.component for timing in fresh.result.timings}
    looked_up_again = {f"LatestBlessed.{model}" for model in MODELS} | {"LastStatistics"}
    looked_up_again |= {f"Pusher.{bundle}" for bundle in BUNDLES}
    assert everything - again.reused == {*looked_up_again, "ReportWriter"}
    assert re.search(r"Trainer\.retrieval +reused from cache", again.output)
    assert f"{len(again.reused)} of {len(everything)} components reused from cache" in again.output
    # A model is not judged against itself.
    assert again.metrics["model"] == fresh.metrics["model"]
    assert not again.metrics["last_blessed"]
    assert again.result.blessed == {"retrieval": True, "ranking": True}
    # What is released already is not released again.
    assert again.versions == fresh.versions


def test_worse_models_are_not_pushed_and_the_reason_is_told(again: Run, worse: Run) -> None:
    assert worse.exit_code == 0
    # A head that never learnt says the same of every row: there is nothing to calibrate, and the run says so.
    warnings = worse.errors.split("WARNING")[1:]
    assert len(warnings) == 3
    assert all("not calibrated: every" in " ".join(warning.split()) for warning in warnings)
    assert {"InteractionGen", "Transform", "StatisticsGen"} <= worse.reused
    assert not {"Trainer.retrieval", "Trainer.ranking"} & worse.reused
    assert worse.versions == again.versions
    assert worse.result.blessed == {"retrieval": False, "ranking": False}
    assert worse.result.pushed == {"retrieval": None, "ranking": None}
    for model, metric in (("retrieval", "recall_at_50"), ("ranking", "click/auc")):
        reason = worse.result.reasons[model]
        # Below the floor, and far below the model that is served.
        assert re.search(rf"{metric} 0\.\d+, required: at least 0\.\d", reason)
        assert re.search(rf"{metric} changed by -0\.\d+", reason)
        assert f"not pushed: {model}: {reason}" in worse.output
    # Float32 sums depend on how Beam happened to batch them.
    judged = {name: value for name, value in again.metrics["model"].items() if value is not None}
    last_blessed = {name: worse.metrics["last_blessed"][name] for name in judged}
    assert last_blessed == pytest.approx(judged, rel=1e-5)
    assert worse.metrics["model"]["ranking/click/auc"] < again.metrics["model"]["ranking/click/auc"] - 0.1
    assert "not pushed" in worse.page.lower()


@pytest.fixture(scope="module")
def last_pushed(again: Run, paths: RunPaths) -> dict[str, Path]:
    """The version folders of the newest pushed models."""
    return {model: paths.serving_models / model / again.versions[model][-1] for model in MODELS}


@pytest.fixture(scope="module")
def server(worse: Run, paths: RunPaths) -> Iterator[ModelServerProcess]:
    """Started after the rejected run, on the folder as it is then."""
    with ModelServerProcess({model: paths.serving_models / model for model in MODELS}) as process:
        yield process


@pytest.fixture(scope="module")
def spec(again: Run) -> DatasetSpec:
    return again.result.config.dataset


@pytest.fixture(scope="module")
def train_clicks(again: Run) -> dict[str, set[str]]:
    """Clicked items of the training split by user, from the contract table."""
    events = pl.read_parquet(Path(again.result.tables_dir) / "interactions.parquet")
    clicks = events.filter((pl.col("split") == "train") & (pl.col("click") > 0))
    grouped = clicks.group_by("user_id").agg(pl.col("item_id"))
    return {user_id: set(item_ids) for user_id, item_ids in grouped.iter_rows()}


def test_the_server_serves_the_newest_pushed_versions(
    server: ModelServerProcess, last_pushed: dict[str, Path]
) -> None:
    assert server.versions == {model: int(folder.name) for model, folder in last_pushed.items()}


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_recommend_prints_the_same_readable_table_over_both_protocols(
    server: ModelServerProcess, paths: RunPaths, protocol: str
) -> None:
    target = {"grpc": server.grpc_target, "rest": server.rest_target}[protocol]
    args = ["recommend", "--user-id", USER, "--k", "5", "--target", target]
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(main, [*args, "--output-dir", str(paths.output_dir)])
    assert shown.exit_code == 0, shown.output
    rows = [line for line in shown.output.splitlines() if re.match(r"│ +\d+ │", line)]
    assert len(rows) == 5
    # The user's taste: 7 % 4. Titles keep their brackets.
    assert sum("[live] video" in row and "of taste 3" in row.split("│")[2] for row in rows) >= 4
    assert all("[live] video" in row.split("│")[3] for row in rows)
    assert "near watched" in shown.output
    assert "score = 1 × click + 2 × like + 0.02 × watch_time" in shown.output
    assert "not in the data" not in shown.output


def test_both_protocols_give_the_same_recommendations(
    server: ModelServerProcess, again: Run, train_clicks: dict[str, set[str]]
) -> None:
    state, in_data = user_state(again.result, USER)
    assert in_data
    assert set(state.seen_item_ids) == train_clicks[USER]
    answers = []
    for target in (server.grpc_target, server.rest_target):
        with RecommenderClient(target, timeout_s=30) as client:
            answers.append(client.recommend(state.request, k=10, exclude_item_ids=state.seen_item_ids))
    over_grpc, over_rest = answers
    assert [item.item_id for item in over_grpc.items] == [item.item_id for item in over_rest.items]
    for one, other in zip(over_grpc.items, over_rest.items, strict=True):
        assert one.predictions == pytest.approx(other.predictions, rel=1e-5)
        assert one.item_id not in train_clicks[USER]
    assert over_grpc.user_is_known and over_rest.user_is_known


@pytest.mark.parametrize(
    ("user_id", "note"),
    [(STRANGER, "is not in the data"), (taste_world.NEWCOMER, "had no training events")],
)
def test_users_without_training_events_get_recommendations_and_a_note(
    server: ModelServerProcess, paths: RunPaths, user_id: str, note: str
) -> None:
    args = ["recommend", "--user-id", user_id, "--k", "5", "--target", server.grpc_target]
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(main, [*args, "--output-dir", str(paths.output_dir)])
    assert shown.exit_code == 0, shown.output
    assert f"user {user_id} {note}" in shown.output
    assert shown.output.count("(no history)") == 5


def test_the_offline_models_answer_as_the_served_ones(
    server: ModelServerProcess, again: Run, spec: DatasetSpec, last_pushed: dict[str, Path]
) -> None:
    states = [user_state(again.result, user_id)[0] for user_id in (USER, "u100", STRANGER)]
    offline = {model: tf.saved_model.load(str(folder)) for model, folder in last_pushed.items()}

    def ask(model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        constants = {name: tf.constant(value) for name, value in inputs.items()}
        answer = offline[model].signatures["serving_default"](**constants)
        return {name: value.numpy() for name, value in answer.items()}

    excluded = padded([state.seen_item_ids for state in states])
    # All three in one batch here, one by one there: neither padding nor neighbours change an answer.
    query = query_arrays(states, spec)
    retrieved = ask("retrieval", {**query, "k": np.full(3, 20, np.int32), "exclude_item_ids": excluded})
    candidates = {"candidate_item_ids": retrieved["item_ids"].astype(object)}
    ranked = ask("ranking", {**ranking_arrays(states, spec), **candidates})
    with RecommenderClient(server.grpc_target, timeout_s=30) as client:
        for row, state in enumerate(states):
            served = client.retrieve(state.query, k=20, exclude_item_ids=state.seen_item_ids)
            item_ids = [item_id.decode() for item_id in retrieved["item_ids"][row]]
            assert [candidate.item_id for candidate in served.candidates] == item_ids
            scores = [candidate.retrieval_score for candidate in served.candidates]
            np.testing.assert_allclose(scores, retrieved["scores"][row], rtol=1e-5, atol=1e-6)
            assert served.user_is_known == bool(retrieved["user_is_known"][row])
            for place, item in enumerate(client.rank(state.request, item_ids)):
                assert item.score == pytest.approx(ranked["score"][row, place], rel=1e-5, abs=1e-6)
                for task in spec.tasks:
                    offline_value = ranked[task.name][row, place]
                    assert item.predictions[task.name] == pytest.approx(offline_value, rel=1e-5, abs=1e-6)


def test_more_than_the_exported_maximum_is_refused_by_name(
    server: ModelServerProcess, paths: RunPaths
) -> None:
    args = ["recommend", "--user-id", USER, "--k", "501", "--target", server.grpc_target]
    shown = CliRunner().invoke(main, [*args, "--output-dir", str(paths.output_dir)])
    assert shown.exit_code == 1
    assert "k must be between 1 and 500" in shown.output


def batch_recommend(paths: RunPaths, folder: Path, user_ids: list[str], *args: str) -> pl.DataFrame:
    users, out = folder / "users.txt", folder / "recs" / "out.parquet"
    users.write_text("\n".join(user_ids) + "\n")
    command = ["batch-recommend", "--users", str(users), "--out", str(out), *args]
    done = CliRunner().invoke(main, [*command, "--output-dir", str(paths.output_dir)])
    assert done.exit_code == 0, done.output
    assert "not in the data, so with general recommendations: 1 user" in done.output
    assert os.listdir(out.parent) == ["out.parquet"]
    return pl.read_parquet(out)


def test_batch_recommend_writes_every_user_in_order_without_seen_items(
    again: Run, paths: RunPaths, tmp_path: Path, train_clicks: dict[str, set[str]]
) -> None:
    # In an order of our own.
    user_ids = [STRANGER, taste_world.NEWCOMER, *(f"u{n}" for n in reversed(range(taste_world.NUM_USERS)))]
    table = batch_recommend(paths, tmp_path, user_ids, "--k", "20")
    assert table.schema == {
        "user_id": pl.String, "rank": pl.Int32, "item_id": pl.String, "score": pl.Float32
    }  # fmt: skip
    assert table["user_id"].to_list() == [user_id for user_id in user_ids for _ in range(20)]
    assert table["rank"].to_list() == [*range(1, 21)] * len(user_ids)
    assert not table.select("user_id", "item_id").is_duplicated().any()
    for (user_id,), rows in table.group_by("user_id"):
        assert rows["score"].is_sorted(descending=True)
        assert not set(rows["item_id"]) & train_clicks.get(str(user_id), set())
    taste = table.filter(pl.col("user_id") == USER)["item_id"].str.slice(1).cast(pl.Int32) % 4
    assert (taste == 3).sum() > 10


def test_batch_recommend_includes_seen_items_on_request_and_all_that_is_left_at_a_large_k(
    again: Run, paths: RunPaths, tmp_path: Path, train_clicks: dict[str, set[str]]
) -> None:
    (tmp_path / "all").mkdir()
    without = batch_recommend(paths, tmp_path, [USER, STRANGER], "--k", "200")
    everything = batch_recommend(paths, tmp_path / "all", [USER, STRANGER], "--k", "200", "--include-seen")
    counts = dict(without["user_id"].value_counts().iter_rows())
    assert counts == {
        USER: taste_world.NUM_ITEMS - len(train_clicks[USER]), STRANGER: taste_world.NUM_ITEMS
    }  # fmt: skip
    assert everything.height == 2 * taste_world.NUM_ITEMS
    assert train_clicks[USER] <= set(everything.filter(pl.col("user_id") == USER)["item_id"])


def test_batch_recommend_refuses_a_k_above_the_exported_maximum(
    again: Run, paths: RunPaths, tmp_path: Path
) -> None:
    users, out = tmp_path / "users.txt", tmp_path / "out.parquet"
    users.write_text(USER)
    command = ["batch-recommend", "--users", str(users), "--out", str(out), "--k", "501"]
    done = CliRunner().invoke(main, [*command, "--output-dir", str(paths.output_dir)])
    assert done.exit_code == 1
    assert "k must be between 1 and 500" in done.output
    assert not list(tmp_path.glob("*parquet*")) + list(tmp_path.glob(".*"))


REFRESHED_ITEMS = {
    # Two that training has not met, one whose content was mended, one that is as it was.
    "video": ["new-taste-0", "new-taste-3", "v0", "v1"],
    "tags": ["all|taste-0", "all|taste-3", "all|taste-3", "all|taste-1"],
    "title": [
        "[live] new of taste 0",
        "[live] new of taste 3",
        "[live] v0 again",
        "[live] video 1 of taste 1",
    ],
}


def refresh_index(paths: RunPaths, *args: str | Path) -> str:
    command = ["refresh-index", *map(str, args), "--output-dir", str(paths.output_dir)]
    done = CliRunner(env={"COLUMNS": "160"}).invoke(main, command)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def refreshed(again: Run, worse: Run, paths: RunPaths, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A copy of the run's folder, for versions of its own."""
    copy = RunPaths(tmp_path_factory.mktemp("refreshed"))
    shutil.copytree(paths.serving_models, copy.serving_models)
    shutil.copy(paths.run_file, copy.run_file)
    return copy


@pytest.fixture(scope="module")
def refresh_output(refreshed: RunPaths, last_pushed: dict[str, Path]) -> str:
    items = refreshed.output_dir / "items.parquet"
    pl.DataFrame(REFRESHED_ITEMS).write_parquet(items)
    return refresh_index(refreshed, "--items", items)


def pushed_versions(paths: RunPaths) -> dict[str, list[str]]:
    return {model: sorted(os.listdir(paths.serving_models / model), key=int) for model in MODELS}


def test_a_refresh_publishes_a_new_version_of_both_models(
    refresh_output: str, refreshed: RunPaths, last_pushed: dict[str, Path]
) -> None:
    assert "added: 2 (new-taste-0, new-taste-3)" in refresh_output
    assert "changed: 1 (v0)" in refresh_output
    assert "removed" not in refresh_output
    assert f"{taste_world.NUM_ITEMS + 2} items, 2 of them not met in training" in refresh_output
    for model, versions in pushed_versions(refreshed).items():
        assert versions[-2] == last_pushed[model].name
        assert f"published: {model} version {versions[-1]}" in refresh_output
    assert warmed_up(refreshed, pushed_versions(refreshed)["retrieval"][-1]) == OF_ALL_SIZES


def ranks_and_scores(folder: Path, run: RunResult) -> tuple[list[str], np.ndarray]:
    """All items for USER by the retrieval model."""
    model = tf.saved_model.load(str(folder))
    query = query_arrays([user_state(run, USER)[0]], run.config.dataset)
    inputs = {**query, "k": np.array([200], np.int32), "exclude_item_ids": np.array([[""]], object)}
    answer = model.signatures["serving_default"](**{n: tf.constant(value) for n, value in inputs.items()})
    ids = [item_id.decode() for item_id in answer["item_ids"].numpy()[0]]
    return ids, answer["scores"].numpy()[0]


def test_new_content_moves_its_item_and_nothing_else(
    refresh_output: str, refreshed: RunPaths, again: Run
) -> None:
    folders = [refreshed.serving_models / "retrieval" / v for v in pushed_versions(refreshed)["retrieval"]]
    (ids, scores), (new_ids, new_scores) = (ranks_and_scores(f, again.result) for f in folders[-2:])
    before, after = dict(zip(ids, scores, strict=True)), dict(zip(new_ids, new_scores, strict=True))
    unchanged = before.keys() - {"", "v0"}
    assert len(unchanged) == taste_world.NUM_ITEMS - 1
    for item_id in unchanged:
        assert after[item_id] == pytest.approx(before[item_id], abs=1e-5)
    # The user likes taste 3.
    assert after["v0"] > before["v0"]
    assert after["new-taste-3"] > after["new-taste-0"]


def test_the_ranker_and_the_titles_know_the_new_items(
    refresh_output: str, refreshed: RunPaths, again: Run
) -> None:
    with ModelServerProcess({model: refreshed.serving_models / model for model in MODELS}) as server:
        with RecommenderClient(server.grpc_target, timeout_s=30) as client:
            ranked = client.rank(user_state(again.result, USER)[0].request, ["new-taste-3", "nothing"])
        assert {item.item_id: item.item_is_known for item in ranked} == {
            "new-taste-3": True,
            "nothing": False,
        }
    assert titles(again.result, refreshed)["new-taste-3"] == "[live] new of taste 3"
    assert titles(again.result, refreshed)["v0"] == "[live] v0 again"


def test_the_same_items_again_publish_nothing(refresh_output: str, refreshed: RunPaths) -> None:
    versions = pushed_versions(refreshed)
    output = refresh_index(refreshed, "--items", refreshed.output_dir / "items.parquet")
    assert "nothing changed: no new version" in output
    assert pushed_versions(refreshed) == versions


def test_the_whole_table_removes_what_is_not_in_it_and_leaves_no_leftovers(
    refresh_output: str, refreshed: RunPaths, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The refresh before has asked a server; only the catalogue differs here.
    monkeypatch.setattr(refresh, "validate_serving", lambda *args: None)
    items = pl.read_parquet(config.parent / "data" / "items.parquet")
    items.filter(pl.col("video") != "v5").write_parquet(refreshed.output_dir / "items.parquet")
    output = refresh_index(refreshed, "--data-dir", refreshed.output_dir)
    assert "removed: 3 (v5, new-taste-0, new-taste-3)" in output
    for model in MODELS:
        assert all(name.isdigit() for name in os.listdir(refreshed.serving_models / model))
    ids, _ = ranks_and_scores(
        refreshed.serving_models / "retrieval" / pushed_versions(refreshed)["retrieval"][-1],
        read_run(refreshed.output_dir),
    )
    assert len(set(ids) - {""}) == taste_world.NUM_ITEMS - 1 and "v5" not in ids


@pytest.fixture(scope="module")
def later_events(again: Run, config: Path) -> pl.DataFrame:
    """Source rows of the eval and test splits, latest first."""
    table = pl.read_parquet(Path(again.result.tables_dir) / "interactions.parquet")
    rows = table.filter(pl.col("split") != "train").sort("event_time_unix_s", descending=True)["row_number"]
    return pl.read_csv(config.parent / "data" / "events.csv", infer_schema=False)[rows.to_list()]


def batch_score(paths: RunPaths, folder: Path, events: pl.DataFrame, *args: str) -> pl.DataFrame:
    given, out = folder / "events.csv", folder / "preds.parquet"
    events.write_csv(given)
    command = ["batch-score", "--interactions", str(given), "--out", str(out), *args]
    done = CliRunner().invoke(main, [*command, "--output-dir", str(paths.output_dir)])
    assert done.exit_code == 0, done.output
    return pl.read_parquet(out)


def test_batch_score_with_online_history_predicts_as_the_evaluator_saw_it(
    last_pushed: dict[str, Path],
    spec: DatasetSpec,
    paths: RunPaths,
    later_events: pl.DataFrame,
    tmp_path: Path,
) -> None:
    names = [*(task.name for task in spec.tasks), "score"]
    table = batch_score(paths, tmp_path, later_events, "--online-history")
    keys = ["user_id", "item_id", "event_time_unix_s"]
    times = (later_events["time_ms"].cast(pl.Int64) // 1_000).to_list()
    assert table.select(keys).rows() == list(
        zip(later_events["uid"], later_events["video"], times, strict=True)
    )
    found = {tuple(row[:3]): row[3:] for row in table.select(*keys, *names).iter_rows()}

    files = sorted((paths.pipeline_root / "InteractionGen" / "examples").glob("*/Split-test/*.gz"))
    dataset = tf.data.TFRecordDataset([str(file) for file in files], compression_type="GZIP")
    examples = list(dataset.as_numpy_iterator())
    ranker = tf.saved_model.load(str(last_pushed["ranking"]))
    answer = ranker.signatures["serving_examples"](examples=tf.constant(examples))
    assert len(examples) > 1_000
    for place, example in enumerate(examples):
        feature = tf.train.Example.FromString(example).features.feature
        user_id, item_id = (feature[key].bytes_list.value[0].decode() for key in keys[:2])
        row = found[user_id, item_id, feature["event_time_unix_s"].int64_list.value[0]]
        assert row == pytest.approx([float(answer[name][place]) for name in names], rel=1e-4, abs=1e-6)


def test_batch_score_needs_no_labels_and_what_it_writes_can_be_weighed(
    last_pushed: dict[str, Path],
    spec: DatasetSpec,
    paths: RunPaths,
    later_events: pl.DataFrame,
    tmp_path: Path,
) -> None:
    blind = batch_score(paths, tmp_path, later_events.drop("clicked", "liked", "watched_s", "duration_s"))
    table = batch_score(paths, tmp_path, later_events)
    assert table.drop("label_click", "label_like", "label_watch_time_s", "label_completion").equals(blind)
    weights = np.array([task.score_weight for task in spec.tasks])
    predictions = blind.select(task.name for task in spec.tasks).to_numpy()
    np.testing.assert_allclose(blind["score"], predictions @ weights, rtol=1e-4, atol=1e-6)
    command = ["score-weights", "--predictions", str(tmp_path / "preds.parquet")]
    command += ["--objective", "click", "--objective", "watch_time_s", "--output-dir", str(paths.output_dir)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert re.search(r"2,\d{3} impressions in \d+ lists by user", done.output)
