"""The run of the taste world that the end-to-end tests and the sabotages share: training takes minutes."""

from pathlib import Path

import pytest

from tests.tfx_pipeline import taste_world
from tests.tfx_pipeline.taste_run import Run, run
from tfx_pipeline.config import RunPaths


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """The folder of the runs."""
    return RunPaths(tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's YAML, beside its data."""
    return taste_world.write(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def fresh(config: Path, paths: RunPaths) -> Run:
    """The first run in the folder."""
    return run(config, paths)
