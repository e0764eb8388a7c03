"""Shared by all tests: the environment that TensorFlow reads at import, and where real data lies."""

import os

# Before any import of TensorFlow. Tests never use a GPU, so that they mean the same on every machine.
os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

REPO = Path(__file__).parent.parent

# The same examples on every run; no deadline, because the first call of a test may pay for an import.
settings.register_profile("funnel", derandomize=True, deadline=None)
settings.load_profile("funnel")


# These share one run of the pipeline, which takes minutes: they go to one worker, and before all others.
SHARE_A_RUN = ("tests/tfx_pipeline/test_end_to_end.py", "tests/tfx_pipeline/test_sabotages.py")


class FilesTogether(LoadFileScheduling):
    """Gives the tests of a file to one worker, since they share fixtures, and those of SHARE_A_RUN too."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return SHARE_A_RUN[0] if file in SHARE_A_RUN else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FilesTogether:
    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; with `--no-loadscope-reorder`, which keeps the order, workers get them so."""
    items.sort(key=lambda item: not item.nodeid.startswith(SHARE_A_RUN))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder that holds `data/` with the real archives; tests that ask for it skip where it is absent."""
    path = Path(os.environ.get("FUNNEL_SHARED_DIR", REPO.parent / "shared")).absolute()
    if not (path / "data").is_dir():
        pytest.skip(
            f"REAL DATA NOT TESTED: {path / 'data'} is absent; set FUNNEL_SHARED_DIR to the folder above it"
        )
    return path
