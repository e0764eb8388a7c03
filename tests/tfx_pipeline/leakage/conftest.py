"""The tiny log is made once."""

import pytest

from tests.tfx_pipeline.leakage.leaky_world import World, build


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("leaky"))
