"""Candidate models must hold the load of the run's objective before they are pushed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from schema.errors import ConfigError, ServingError
from serving import loadtest
from serving.slo import Slo
from tfx_pipeline.config import BUNDLES, RunConfig, load_run_config
from tfx_pipeline.evidence import read_load
from tfx_pipeline.pipeline import PipelineLocations, create_pipeline
from tfx_pipeline.slo_gate import check_slo
from tfx_pipeline.user_states import UserState

SLO = Slo(rate_per_s=400, duration_s=0.5, p99_ms=10_000, error_budget=0.1)
STATES = [UserState(f"u{i}", {"user_id": f"u{i}"}, (f"seen{i}",), b"") for i in range(3)]


@pytest.fixture
def asked(monkeypatch):
    """User and excluded items of each request to a stand-in, which fails every `fail_every`-th one."""
    asked = SimpleNamespace(requests=[], fail_every=100_000)

    class Client:
        def __init__(self, target, timeout_s, layouts, retry):
            assert (target, retry.max_attempts) == ("grpc://server", 1)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def wait_until_ready(self, timeout_s):
            pass

        def recommend(self, query, k, exclude_item_ids, num_candidates):
            asked.requests.append((query["user_id"], exclude_item_ids))
            # The first five only warm up.
            if len(asked.requests) > 5 and len(asked.requests) % asked.fail_every == 0:
                raise ServingError("no")
            return SimpleNamespace(stage_seconds={"funnel": 0.001})

    monkeypatch.setattr(loadtest, "RecommenderClient", Client)
    return asked


def test_a_met_objective_is_written_down(asked, tmp_path: Path) -> None:
    check_slo(SLO, "grpc://server", STATES, tmp_path / "load.json")
    written = json.loads((tmp_path / "load.json").read_text())
    assert written["slo"] == SLO.model_dump()
    assert written["result"]["num_requests"] == len(asked.requests) - 5 > 100
    assert set(asked.requests) == {(f"u{i}", (f"seen{i}",)) for i in range(3)}
    found = read_load(tmp_path / "load.json")
    assert found is not None and found.misses == []
    assert found.p99_ms == written["result"]["latency_ms"]["total"]["p99"]
    assert read_load(tmp_path / "none.json") is None


def test_a_missed_objective_is_a_reason_and_is_written_down_too(asked, tmp_path: Path) -> None:
    asked.fail_every = 4
    with pytest.raises(ServingError, match=r"slo.* is missed: .*the budget is 10.00%"):
        check_slo(SLO, "grpc://server", STATES, tmp_path / "load.json")
    assert json.loads((tmp_path / "load.json").read_text())["result"]["error_share"] > 0.2
    found = read_load(tmp_path / "load.json")
    assert found is not None and "the budget is 10.00%" in found.misses[0]


def test_no_objective_is_the_default_and_one_reaches_the_component() -> None:
    setting = "slo={rate_per_s: 20, duration_s: 20, p99_ms: 500, error_budget: 0.001}"

    def given(*overrides):
        locations = PipelineLocations("t", 0, "p", "s", "v", dict.fromkeys(BUNDLES, ""))
        pipeline = create_pipeline(load_run_config("simulated", overrides), locations)
        found = {node.id: node for node in pipeline.components}
        gates = RunConfig.model_validate_json(found["ModelValidator.ranking"].exec_properties["gates"])
        slo = found["ServingValidator"].exec_properties["slo"]
        # The gate judges by the objective whose load was put on the models.
        assert gates.slo == (Slo.model_validate_json(slo) if slo else None)
        return slo

    assert given() == ""
    assert Slo.model_validate_json(given(setting)).p99_ms == 500
    with pytest.raises(ConfigError, match="slo"):
        load_run_config("simulated", ["slo.rate_per_s=20"])
