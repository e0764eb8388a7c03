"""The command line as a person meets it: help with examples, one readable error, documented exit codes."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from click.testing import CliRunner, Result

from schema.errors import DataError
from tests.tfx_pipeline import taste_world
from tfx_pipeline import local_runner, run_result
from tfx_pipeline.cli import main
from tfx_pipeline.config import BUNDLES, RunPaths, load_run_config
from tfx_pipeline.run_result import RunResult, write_run
from trainer.fingerprint import Fingerprint

REPO = Path(__file__).parents[2]
COMMANDS = sorted(main.commands)
GIB = 1024**3


def funnel(*args: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """The run YAML of a valid dataset."""
    return taste_world.write(tmp_path / "world")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A directory in which a run finished and pushed nothing."""
    folder = tmp_path / "run"
    folder.mkdir()
    result = RunResult(
        dataset="simulated",
        config_json=load_run_config("simulated").model_dump_json(),
        tables_dir=str(folder / "data"),
        user_states=str(folder / "user_states"),
        blessed={"retrieval": False, "ranking": True},
        pushed={"retrieval": None, "ranking": "7"},
        reasons={"retrieval": "recall_at_100 0.0100, required: at least 0.1"},
        report=str(folder / "report" / "index.html"),
        timings=(),
    )
    write_run(result, folder)
    return folder


def test_the_commands_of_the_product_exist() -> None:
    expected = {
        "run",
        "serve",
        "recommend",
        "batch-recommend",
        "refresh-index",
        "score-weights",
        "report",
        "doctor",
        "compile",
    }
    assert expected <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_every_command_shows_an_example(command: str, flag: str) -> None:
    result = funnel(command, flag)
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\n +funnel {command}\b", result.output)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_uses_a_run_takes_output_dir_with_the_same_default(command: str) -> None:
    text = " ".join(funnel(command, "--help").output.split())
    # The graph alone, and one bundle alone.
    uses_a_run = command not in ("compile", "audit-placement")
    assert ("--output-dir DIRECTORY" in text) == uses_a_run
    assert ("[default: runs/default]" in text) == uses_a_run


def test_the_version_is_that_of_the_package() -> None:
    assert funnel("--version").output.split()[-1] == (REPO / "trainer/version.py").read_text().split('"')[-2]


def test_help_loads_neither_tensorflow_nor_tfx() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom tfx_pipeline.cli import main\n"
        "CliRunner().invoke(main, ['run', '--help'])\n"
        "print(*{'tensorflow', 'tfx', 'apache_beam'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Usage:"),
        (["rum"], "No such command"),
        (["run"], "give one of --dataset"),
        (["run", "--dataset", "simulated", "--config", "x.yaml"], "give one of --dataset"),
        (["run", "--dataset", "netflix"], "'netflix' is not one of"),
        (["run", "--config", "absent.yaml"], "no configuration file absent.yaml"),
        (["run", "--dataset", "simulated", "--set", "ranking.sed=1"], "did you mean 'seed'"),
        (["run", "--dataset", "simulated", "--set", "nonsense"], "'section.key=value' was expected"),
        (["recommend"], "Missing option '--user-id'"),
        (["recommend", "--user-id", "u1", "--k", "0"], "is not in the range x>=1"),
        (["batch-recommend", "--users", "f", "--out", "o", "--k", "-1"], "is not in the range x>=1"),
        (["batch-recommend", "--out", "o"], "Missing option '--users'"),
        (["serve", "--port", "http"], "not a valid integer"),
        (["refresh-index"], "give one of --items FILE"),
        (["refresh-index", "--items", __file__, "--data-dir", "."], "give one of --items FILE"),
        (["refresh-index", "--items", "absent.csv"], "'absent.csv' does not exist"),
        (["refresh-index", "--data-dir", "absent"], "'absent' does not exist"),
        (["compile", "--dataset", "simulated"], "Missing option"),
        (["score-weights"], "Missing option '--predictions'"),
        (["score-weights", "--predictions", "p", "--top", "0"], "is not in the range x>=1"),
        (["score-weights", "--predictions", "p", "--dataset", "simulated"], "at least two different ones"),
    ],
)
def test_wrong_usage_exits_2(args: list[str], message: str) -> None:
    result = funnel(*args)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    "args",
    [
        ["serve"],
        ["report"],
        ["recommend", "--user-id", "u1"],
        ["batch-recommend", "--users", "users.txt", "--out", "recs.parquet"],
        ["refresh-index", "--items", __file__],
        ["score-weights", "--predictions", "preds.parquet", "--objective", "click", "--objective", "like"],
    ],
)
def test_commands_without_a_finished_run_say_what_to_do(args: list[str], tmp_path: Path) -> None:
    result = funnel(*args, "--output-dir", tmp_path / "nothing")
    assert result.exit_code == 1
    assert f"no finished run in {tmp_path / 'nothing'}; run 'funnel run" in result.output


@pytest.mark.parametrize("text", ["", "{}", '{"timings": [], "surprise": 1}'])
def test_a_run_file_of_another_version_says_what_to_do(run_dir: Path, text: str) -> None:
    RunPaths(run_dir).run_file.write_text(text)
    result = funnel("report", "--output-dir", run_dir)
    assert result.exit_code == 1
    assert "cannot be read by this version of Funnel" in result.output


def test_report_tells_the_decision_and_the_reason(run_dir: Path) -> None:
    RunPaths(run_dir).report.mkdir()
    (RunPaths(run_dir).report / "index.html").touch()
    result = funnel("report", "--output-dir", run_dir)
    assert result.exit_code == 0
    assert "not pushed: retrieval: recall_at_100 0.0100, required: at least 0.1" in result.output
    assert "blessed and pushed: ranking version 7" in result.output
    # On a line of its own, however long: people copy it.
    assert f"  report: {run_dir}/report/index.html" in result.output.splitlines()


def test_report_that_is_gone_is_an_error(run_dir: Path) -> None:
    result = funnel("report", "--output-dir", run_dir)
    assert result.exit_code == 1
    assert "index.html is gone" in result.output


def test_serving_a_model_that_was_never_pushed_tells_why(run_dir: Path) -> None:
    result = funnel("serve", "--output-dir", run_dir)
    assert result.exit_code == 1
    assert "no retrieval model was pushed" in result.output
    assert "required: at least 0.1" in result.output


def push_empty_bundles(run_dir: Path) -> None:
    """Enough for `funnel serve` to start the server, which loads models only after its checks."""
    for model in BUNDLES:
        version = RunPaths(run_dir).serving_models / model / "1"
        version.mkdir(parents=True)
        (version / "saved_model.pb").touch()
        Fingerprint({}).write(version)


def test_flags_after_two_dashes_go_to_the_server(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    push_empty_bundles(run_dir)
    result = funnel("serve", "--output-dir", run_dir, "--", "--enable_batching", "--num_workers=0")
    assert result.exit_code == 2
    assert "argument --num_workers: must be at least 1, got 0" in result.output + capfd.readouterr().err


def test_bundles_of_different_runs_are_not_served(run_dir: Path) -> None:
    push_empty_bundles(run_dir)
    for model, ranker in (("ranking", "r1"), ("funnel", "r2")):
        Fingerprint({"ranker": ranker}).write(RunPaths(run_dir).serving_models / model / "1")
    result = funnel("serve", "--output-dir", run_dir)
    assert result.exit_code == 1
    # Whatever the width of the lines.
    assert "'ranking' and 'funnel' do not belong together" in " ".join(result.output.split())


@pytest.mark.parametrize("flag", ["--port", "--rest-api-port"])
def test_a_port_that_is_taken_is_named(run_dir: Path, flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    push_empty_bundles(run_dir)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ports = {"--port": "0", "--rest-api-port": "0"} | {flag: port}
        result = funnel("serve", "--output-dir", run_dir, *(part for pair in ports.items() for part in pair))
    assert result.exit_code == 1
    assert port in result.output + capfd.readouterr().err


def test_recommend_says_when_no_server_answers(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfx_pipeline import recommend
    from tfx_pipeline.user_states import UserState

    state = UserState("u1", {"user_id": "u1"}, (), b"")
    monkeypatch.setattr(recommend, "user_state", lambda run, user_id: (state, True))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        target = f"http://127.0.0.1:{closed.getsockname()[1]}"
        result = funnel("recommend", "--user-id", "u1", "--output-dir", run_dir, "--target", target)
    assert result.exit_code == 1
    assert target in result.output
    assert "funnel serve" in result.output


def test_recommend_refuses_a_target_of_another_form(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfx_pipeline import recommend
    from tfx_pipeline.user_states import UserState

    state = UserState("u1", {"user_id": "u1"}, (), b"")
    monkeypatch.setattr(recommend, "user_state", lambda run, user_id: (state, True))
    result = funnel("recommend", "--user-id", "u1", "--output-dir", run_dir, "--target", "localhost:8500")
    assert result.exit_code == 2
    assert "grpc://" in result.output


def test_recommend_asks_with_the_weights_given_and_prints_their_formula(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving import client
    from tfx_pipeline import recommend
    from tfx_pipeline.user_states import UserState

    asked: list[dict[str, float]] = []

    def answer(self: client.RecommenderClient, query: dict[str, str], **named: Any) -> client.Recommendations:
        asked.append(named["score_weights"])
        return client.Recommendations((), True, 0, {})

    state = UserState("u1", {"user_id": "u1"}, (), b"")
    monkeypatch.setattr(recommend, "user_state", lambda run, user_id: (state, True))
    monkeypatch.setattr(client.RecommenderClient, "recommend", answer)
    monkeypatch.setattr(recommend, "titles", lambda run, paths: {})
    command = ["recommend", "--user-id", "u1", "--output-dir", run_dir, "--target", "http://127.0.0.1:1"]
    result = funnel(*command, "--weights", "like=4")
    assert result.exit_code == 0, result.output
    assert asked[0]["like"] == 4
    assert "4 × like" in result.output
    refused = funnel(*command, "--weights", "lke=4")
    assert refused.exit_code == 2
    assert "no task 'lke'; declared: click" in refused.output


def test_batch_recommend_names_a_missing_users_file(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "recs.parquet"
    result = funnel("batch-recommend", "--users", tmp_path / "no.txt", "--out", out, "--output-dir", run_dir)
    assert result.exit_code == 1
    assert f"no users file {tmp_path / 'no.txt'}" in result.output
    assert not out.exists()


def test_a_second_run_in_the_same_directory_is_refused(world: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    code = (
        "import sys, pathlib\nfrom tfx_pipeline.config import RunPaths\n"
        "from tfx_pipeline.local_runner import run_lock\n"
        "with run_lock(RunPaths(pathlib.Path(sys.argv[1]))):\n    print('held', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, output_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        result = funnel("run", "--config", world, "--output-dir", output_dir)
        holder.communicate(b"\n")
    assert result.exit_code == 1
    assert f"another run (process {holder.pid}) is using {output_dir}" in result.output
    assert not RunPaths(output_dir).tables.exists()


def test_items_are_not_refreshed_during_a_run(run_dir: Path) -> None:
    with local_runner.run_lock(RunPaths(run_dir)):
        result = funnel("refresh-index", "--items", __file__, "--output-dir", run_dir)
    assert result.exit_code == 1
    assert f"another run (process {os.getpid()}) is using {run_dir}" in result.output


def test_refreshing_without_a_pushed_model_tells_why(run_dir: Path) -> None:
    result = funnel("refresh-index", "--items", __file__, "--output-dir", run_dir)
    assert result.exit_code == 1
    assert "no retrieval model was pushed" in result.output
    assert "required: at least 0.1" in result.output


def test_the_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    code = (
        "import os, sys, pathlib\nfrom tfx_pipeline.config import RunPaths\n"
        "from tfx_pipeline.local_runner import run_lock\n"
        "with run_lock(RunPaths(pathlib.Path(sys.argv[1]))):\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPO, check=False)
    assert paths.lock_file.read_text()
    with local_runner.run_lock(paths):
        assert paths.lock_file.read_text() == str(os.getpid())


def test_a_dataset_smaller_than_a_batch_is_refused_before_training(world: Path, tmp_path: Path) -> None:
    result = funnel(
        "run", "--config", world, "--output-dir", tmp_path / "run", "--set", "retrieval.batch_size=100000"
    )
    assert result.exit_code == 1
    assert re.search(r"[\d,]+ train positives are fewer than one batch of 100,000; lower it", result.output)
    assert not RunPaths(tmp_path / "run").pipeline_root.exists()


@pytest.mark.parametrize("name", ["events.csv", "items.parquet"])
def test_a_missing_source_file_is_named(world: Path, tmp_path: Path, name: str) -> None:
    (world.parent / "data" / name).unlink()
    result = funnel("run", "--config", world, "--output-dir", tmp_path / "run")
    assert result.exit_code == 1
    assert name in result.output


def test_data_dir_that_is_no_folder_is_named(world: Path, tmp_path: Path) -> None:
    result = funnel("run", "--config", world, "--output-dir", tmp_path / "run", "--data-dir", tmp_path / "no")
    assert result.exit_code == 1
    assert f"--data-dir {tmp_path / 'no'} is not a folder" in result.output


def test_own_data_without_a_folder_is_an_error(world: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(world.read_text())
    del values["data_dir"]
    world.write_text(yaml.safe_dump(values))
    result = funnel("run", "--config", world, "--output-dir", tmp_path / "run")
    assert result.exit_code == 1
    assert "give --data-dir" in result.output


def test_the_simulated_dataset_takes_no_data_dir(tmp_path: Path) -> None:
    result = funnel("run", "--dataset", "simulated", "--data-dir", tmp_path, "--output-dir", tmp_path / "run")
    assert result.exit_code == 1
    assert "takes no --data-dir" in result.output


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_with_too_little_room_is_refused_before_work(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(100 * GIB, 99 * GIB, GIB))
    result = funnel("run", "--config", world, "--output-dir", tmp_path / "run")
    assert result.exit_code == 1
    assert "has 1.0 GiB free, a run needs 2 GiB" in result.output
    assert not RunPaths(tmp_path / "run").tables.exists()


def test_a_run_of_which_a_piece_is_gone_says_which(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = funnel("waterfall", "--output-dir", run_dir)
    assert (result.exit_code, "Traceback" in result.output) == (1, False)
    assert f"{RunPaths(run_dir).metadata} is gone; 'funnel run' with the same settings" in result.output
    # As Python tells it, and as Polars does.
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "/run/interactions.parquet"),
        FileNotFoundError("No such file or directory (os error 2): /run/interactions.parquet"),
    ):
        monkeypatch.setattr(run_result, "read_run", _raise(error))
        result = funnel("waterfall", "--output-dir", run_dir)
        assert (result.exit_code, "Traceback" in result.output) == (1, False)
        assert "/run/interactions.parquet; what is gone of a run, 'funnel run'" in result.output
        assert "'funnel --traceback waterfall …' shows where" in result.output
        # A bug of our own that looks for a file in the wrong place keeps its traceback.
        with pytest.raises(FileNotFoundError):
            CliRunner().invoke(
                main, ["--traceback", "waterfall", "--output-dir", str(run_dir)], catch_exceptions=False
            )


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*args: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        # As Arrow and TensorFlow tell it.
        (RuntimeError("UNKNOWN: /x/y; No space left on device"), "the disk is full"),
        (KeyboardInterrupt(), "interrupted; nothing half-written was pushed"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/srv/run"), "'/srv/run'"),
        (DataError("line one\nline two"), "line one\nline two"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_what_ends_a_run_is_told_in_words(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    monkeypatch.setattr(local_runner, "prepare", _raise(error))
    result = funnel("run", "--config", world, "--output-dir", tmp_path / "run")
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    log = RunPaths(tmp_path / "run").log_file.read_text()
    assert ("Traceback" in log) == (not isinstance(error, KeyboardInterrupt))
    # The directory is free again.
    with local_runner.run_lock(RunPaths(tmp_path / "run")):
        pass


def test_an_unexpected_error_of_our_own_names_the_log(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_runner, "prepare", _raise(ZeroDivisionError("division by zero")))
    result = funnel("run", "--config", world, "--output-dir", tmp_path / "run")
    assert f"more about it: {tmp_path / 'run' / 'run.log'}" in result.output


def test_an_interrupt_of_another_command_exits_1(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfx_pipeline import run_result

    monkeypatch.setattr(run_result, "read_run", _raise(KeyboardInterrupt()))
    result = funnel("report", "--output-dir", run_dir)
    assert result.exit_code == 1
    assert "interrupted" in result.output


def test_a_run_writes_the_lock_and_the_tables_where_it_says(world: Path, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.output_dir.mkdir()
    tables = local_runner.prepare(load_run_config(world), paths, None, tmp_path / "cache")
    assert tables.parent == paths.tables
    assert json.loads((tables / "summary.json").read_text())
    assert (tables / "schema.pbtxt").read_text().count("feature {") > 5
