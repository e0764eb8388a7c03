"""One real model server for the tests of this folder, on tiny models saved into a temporary folder."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.process import ModelServerProcess
from serving.warmup import write_warmup_requests
from tests.serving import models

POLL_WAIT_S = 0.1


@pytest.fixture(scope="session")
def base_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base path by model name; `swapped` is for the tests that push versions."""
    root = tmp_path_factory.mktemp("serving_models")
    paths = {
        name: root / name
        for name in (
            "retrieval",
            "ranking",
            "ranking_of_other_run",
            "pre_ranking",
            "one_call",
            "echo",
            "examples",
            "swapped",
        )
    }
    for path in paths.values():
        path.mkdir()
    for name, model, hashes in (
        ("retrieval", models.Retrieval(), {"transform": "t1", "catalogue": "c1", "index": "i1"}),
        ("ranking", models.Ranking(), {"transform": "t1", "catalogue": "c1", "ranker": "r1"}),
        ("ranking_of_other_run", models.Ranking(), {"transform": "t1", "catalogue": "c2", "ranker": "r2"}),
    ):
        signatures = {"serving_default": model.serve, "fingerprint": models.fingerprint(**hashes)}
        models.save(model, paths[name] / "1", **signatures)
    ranking = models.Ranking()
    models.save(
        ranking,
        paths["pre_ranking"] / "1",
        serving_default=ranking.serve,
        serving_weighted=ranking.weighted,
        pre_rank=ranking.pre_rank,
        score_tasks=models.score_tasks,
    )
    funnel = models.Funnel()
    models.save(funnel, paths["one_call"] / "1", serving_default=funnel.serve, score_tasks=models.score_tasks)
    models.save_echo(paths["echo"] / "1", version=1)
    models.save_echo(paths["swapped"] / "1", version=1)
    models.save_examples_model(paths["examples"] / "1")
    requests = [{"x": np.zeros(size, np.float32)} for size in (1, 2, 4)]
    write_warmup_requests(paths["echo"] / "1", "echo", {"which_version": requests})
    return paths


@pytest.fixture(scope="session")
def echo_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved versions 1 to 4 of the echo model, to be copied to where a test wants them."""
    root = tmp_path_factory.mktemp("echo_versions")
    for version in range(1, 5):
        models.save_echo(root / str(version), version=version)
    return root


@pytest.fixture(scope="session")
def server(base_paths: dict[str, Path]) -> Iterator[ModelServerProcess]:
    with ModelServerProcess(base_paths, poll_wait_s=POLL_WAIT_S) as process:
        yield process
