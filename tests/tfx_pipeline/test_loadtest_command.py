"""`funnel loadtest`: what it asks, writes and exits with; the server is a stand-in."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import serving.loadtest
from serving.loadtest import LoadRequest
from serving.transport import DeadlineExceededError
from tfx_pipeline.cli import main
from tfx_pipeline.commands import loadtest as command


class Client:
    """Answers at once; every tenth request after the warm-up is too late."""

    def __init__(self, target, timeout_s, layouts, retry):
        assert retry.max_attempts == 1, "a repeated request would hide an error"
        Client.made_with = (target, timeout_s, [type(layout).__name__ for layout in layouts])
        self.num_requests = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait_until_ready(self, timeout_s):
        pass

    def recommend(self, query, k, exclude_item_ids, num_candidates):
        self.num_requests += 1
        if self.num_requests % 10 == 0:
            raise DeadlineExceededError("late")
        return SimpleNamespace(stage_seconds={"funnel": 0.001})


@pytest.fixture
def funnel(monkeypatch, tmp_path):
    monkeypatch.setattr(serving.loadtest, "RecommenderClient", Client)
    monkeypatch.setattr(command, "_requests", lambda *args: [LoadRequest({"user_id": "u"})])
    added = {}
    monkeypatch.setattr(command, "add_to_report", lambda folder, **measured: added.update(measured))
    monkeypatch.setattr(Client, "added", added, raising=False)
    return lambda *args: CliRunner().invoke(main, ["loadtest", "--out", str(tmp_path / "out"), *args])


def objective(tmp_path, budget):
    path = tmp_path / "slo.yaml"
    path.write_text(f"{{rate_per_s: 400, duration_s: 0.6, p99_ms: 5000, error_budget: {budget}}}")
    return str(path)


def test_rates_are_measured_in_order_and_written_down(funnel, tmp_path):
    done = funnel("--rate", "80", "--rate", "40", "--duration-s", "0.5", "--layout", "one-call")
    assert done.exit_code == 0, done.output
    assert Client.made_with == ("grpc://127.0.0.1:8500", 2.0, ["OneCall", "OneCall"])
    assert done.output.index("40 requests/s for 0.5 s") < done.output.index("80 requests/s for 0.5 s")
    assert "DeadlineExceededError: " in done.output and "ms CPU per request" in done.output
    written = json.loads((tmp_path / "out" / "loadtest.json").read_text())
    assert [result["rate_per_s"] for result in written["results"]] == [40, 80]
    assert written["settings"]["num_users"] == 1
    assert (tmp_path / "out" / "loadtest.png").read_bytes().startswith(b"\x89PNG")
    added = Client.added["load_test"]
    assert [result.rate_per_s for result in added.results] == [40, 80]
    assert added.settings == written["settings"]


def test_the_exit_code_says_whether_the_objective_is_met(funnel, tmp_path):
    met = funnel("--slo", objective(tmp_path, 0.2))
    assert met.exit_code == 0 and "is met" in met.output, met.output
    missed = funnel("--slo", objective(tmp_path, 0.01))
    assert missed.exit_code == 1
    text = " ".join(missed.output.split())
    assert "slo.yaml is missed: " in text and "the budget is 1.00% (DeadlineExceededError: " in text
    assert (tmp_path / "out" / "loadtest.json").is_file()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--slo", "x.yaml", "--rate", "5"], "give no --rate"),
        (["--k", "200"], "--k is above --num-candidates"),
        (["--rate", "0"], "--rate"),
        (["--slo", "absent.yaml"], "no configuration file absent.yaml"),
    ],
    ids=["slo-and-rate", "k", "rate", "absent"],
)
def test_wrong_usage_is_told(funnel, args, complaint):
    done = funnel(*args)
    assert done.exit_code == 2 and complaint in done.output
