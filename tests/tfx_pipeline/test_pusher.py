"""A version folder appears complete or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest
from tfx import types
from tfx import v1 as tfx
from tfx.dsl.io import fileio
from tfx.types import standard_artifacts
from tfx.utils import proto_utils

from tfx_pipeline.components.pusher import BLESSED_AT, REFRESHED_FINGERPRINT, AtomicPusherExecutor

FILES = {
    "saved_model.pb": b"graph",
    "fingerprint.pb": b"print",
    "variables/variables.index": b"index",
    "variables/variables.data-00000-of-00001": b"weights" * 1000,
    "assets/vocabulary": b"a\nb\n",
    "assets.extra/tf_serving_warmup_requests": b"warm",
    # TFX itself would leave out the graph inside the checkpoint.
    "assets.extra/checkpoint/transform/transform_fn/saved_model.pb": b"transform graph",
    "assets.extra/checkpoint/manifest.json": b"{}",
}


NOW = 1_800_000_000  # when the tests' infra validation blessed


class World:
    """Artifacts of one push."""

    def __init__(self, root: Path) -> None:
        self.base = root / "serving_models" / "ranking"
        self.model = standard_artifacts.Model()
        self.model.uri = str(root / "model")
        for name, content in FILES.items():
            path = root / "model" / "Format-Serving" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.pushed = standard_artifacts.PushedModel()
        self.pushed.uri = str(root / "pushed")

    def push(self, blessed: bool = True, infra_blessed: bool = True, partner_blessed: bool = True) -> None:
        destination = tfx.proto.PushDestination(
            filesystem=tfx.proto.PushDestination.Filesystem(base_directory=str(self.base))
        )
        inputs: dict[str, list[types.Artifact]] = {"model": [self.model]}
        for key, kind, value in (
            ("model_blessing", standard_artifacts.ModelBlessing, blessed),
            ("partner_blessing", standard_artifacts.ModelBlessing, partner_blessed),
            ("infra_blessing", standard_artifacts.InfraBlessing, infra_blessed),
        ):
            blessing = kind()
            blessing.set_int_custom_property("blessed", int(value))
            if key == "infra_blessing":
                blessing.set_string_custom_property("blessing_status", "")
                blessing.set_int_custom_property(BLESSED_AT, NOW)
            inputs[key] = [blessing]
        AtomicPusherExecutor().Do(
            inputs,
            {"pushed_model": [self.pushed]},
            {"push_destination": proto_utils.proto_to_json(destination)},
        )

    def version_files(self) -> dict[str, dict[str, bytes]]:
        versions = os.listdir(self.base) if self.base.is_dir() else []
        return {
            version: {
                str(path.relative_to(self.base / version)): path.read_bytes()
                for path in (self.base / version).rglob("*")
                if path.is_file()
            }
            for version in versions
        }


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_blessed_model_is_pushed_whole(world: World) -> None:
    world.push()
    ((version, files),) = world.version_files().items()
    assert version == str(NOW)
    assert files == FILES
    assert world.pushed.get_string_custom_property("pushed_version") == version
    assert world.pushed.get_string_custom_property("pushed_destination") == str(world.base / version)


def test_bundles_pushed_at_different_times_get_one_version(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.push()
    world.base = world.base.with_name("retrieval")
    monkeypatch.setattr("time.time", lambda: NOW + 60.0)
    world.push()
    assert list(world.version_files()) == [str(NOW)]


def test_a_version_is_larger_than_all_before_it_whatever_the_clock_said(world: World) -> None:
    (world.base / str(NOW + 5)).mkdir(parents=True)
    world.push()
    assert set(world.version_files()) == {str(NOW + 5), str(NOW + 6)}
    assert world.pushed.get_string_custom_property("pushed_version") == str(NOW + 6)


@pytest.mark.parametrize("missing", ["blessed", "infra_blessed", "partner_blessed"])
def test_without_every_blessing_nothing_is_pushed(world: World, missing: str) -> None:
    world.push(**{missing: False})
    assert world.version_files() == {}
    assert not world.pushed.get_string_custom_property("pushed_version")


def test_the_version_appears_in_one_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, dict[str, bytes]]] = []
    copy = fileio.copy

    def watched_copy(*args: Any, **options: Any) -> None:
        copy(*args, **options)
        seen.append({version: files for version, files in world.version_files().items() if version.isdigit()})

    monkeypatch.setattr(fileio, "copy", watched_copy)
    world.push()
    # After each copied file no server that polls could see a version yet.
    assert len(seen) >= len(FILES)
    assert not any(seen[: len(FILES)])
    assert len(world.version_files()) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_push_that_breaks_off_leaves_nothing_and_the_next_one_works(
    world: World, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    copied = []
    copy = fileio.copy

    def breaking_copy(*args: Any, **options: Any) -> None:
        if len(copied) == 3:
            raise error
        copied.append(args)
        copy(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fileio, "copy", breaking_copy)
        with pytest.raises(type(error)):
            world.push()
    assert len(copied) == 3
    assert world.version_files() == {}
    world.push()
    assert list(world.version_files().values()) == [FILES]


def test_the_model_that_is_the_newest_version_is_not_pushed_again(world: World) -> None:
    world.push()
    (version,) = world.version_files()
    world.pushed.set_string_custom_property("pushed_version", "")
    world.push()
    assert list(world.version_files()) == [version]
    assert world.pushed.get_string_custom_property("pushed_version") == version


def test_a_newest_version_of_another_model_does_not_stop_a_push(world: World) -> None:
    other = world.base / "1600000000"
    other.mkdir(parents=True)
    (other / "fingerprint.pb").write_bytes(b"another print")
    world.push()
    assert len(world.version_files()) == 2
    assert world.pushed.get_string_custom_property("pushed_version") != "1600000000"


def test_a_model_whose_newest_version_has_newer_items_is_not_pushed_again(world: World) -> None:
    world.push()
    (pushed,) = world.version_files()
    refreshed = world.base / str(int(pushed) + 1)
    (refreshed / "assets.extra").mkdir(parents=True)
    (refreshed / "fingerprint.pb").write_bytes(b"print of the refreshed model")
    (refreshed / REFRESHED_FINGERPRINT).write_bytes(FILES["fingerprint.pb"])
    world.push()
    assert set(world.version_files()) == {pushed, refreshed.name}
    assert world.pushed.get_string_custom_property("pushed_version") == refreshed.name


def test_leftovers_of_a_killed_push_never_become_a_version(world: World) -> None:
    leftover = world.base / ".staging" / "1600000000"
    leftover.mkdir(parents=True)
    (leftover / "saved_model.pb").write_bytes(b"half")
    world.push()
    assert list(world.version_files().values()) == [FILES]
