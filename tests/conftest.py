"""Shared by all tests: the environment that TensorFlow reads at import, and where real data lies."""

import os

# Before any import of TensorFlow. Tests never use a GPU, so that they mean the same on every machine.
os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from pathlib import Path

import pytest
from hypothesis import settings

REPO = Path(__file__).parent.parent

# The same examples on every run; no deadline, because the first call of a test may pay for an import.
settings.register_profile("funnel", derandomize=True, deadline=None)
settings.load_profile("funnel")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder that holds `data/` with the real archives; tests that ask for it skip where it is absent."""
    path = Path(os.environ.get("FUNNEL_SHARED_DIR", REPO.parent / "shared")).absolute()
    if not (path / "data").is_dir():
        pytest.skip(
            f"REAL DATA NOT TESTED: {path / 'data'} is absent; set FUNNEL_SHARED_DIR to the folder above it"
        )
    return path
