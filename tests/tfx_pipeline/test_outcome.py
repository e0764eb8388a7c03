"""What a run decided is read from ML Metadata."""

from pathlib import Path

import ml_metadata as mlmd
import pytest
from ml_metadata.proto import metadata_store_pb2 as pb

from tfx_pipeline.gates import why_held_back
from tfx_pipeline.outcome import latest_failed_infra


class Store:
    """A database with blessings of infra validation."""

    def __init__(self, path: Path) -> None:
        connection = pb.ConnectionConfig()
        connection.sqlite.filename_uri = str(path)
        self._store = mlmd.MetadataStore(connection)
        self._type = self._store.put_artifact_type(pb.ArtifactType(name="InfraBlessing"))

    def judge(self, blessed: bool | None) -> str:
        artifact = pb.Artifact(type_id=self._type)
        if blessed is not None:
            artifact.custom_properties["blessed"].int_value = int(blessed)
        (artifact_id,) = self._store.put_artifacts([artifact])
        return str(artifact_id)


def test_a_refusal_is_named_until_the_next_one_so_that_no_cached_refusal_is_met_again(tmp_path: Path) -> None:
    path = tmp_path / "metadata.sqlite"
    assert latest_failed_infra(path) == ""
    store = Store(path)
    assert latest_failed_infra(path) == ""
    store.judge(True)
    assert latest_failed_infra(path) == ""
    first = store.judge(False)
    assert latest_failed_infra(path) == first
    # Still the same: another name would lead back to the refusal in the cache.
    store.judge(True)
    store.judge(None)
    assert latest_failed_infra(path) == first
    second = store.judge(False)
    assert latest_failed_infra(path) == second != first


@pytest.mark.parametrize(
    ("retrieval", "ranking", "why"),
    [
        (True, True, None),
        (True, False, "bundles are pushed together, and ranking is not blessed"),
        # It has reasons of its own.
        (False, True, None),
        (False, False, None),
    ],
)
def test_a_blessed_model_is_held_back_by_its_partner_alone(
    retrieval: bool, ranking: bool, why: str | None
) -> None:
    assert why_held_back("retrieval", {"retrieval": retrieval, "ranking": ranking}) == why
