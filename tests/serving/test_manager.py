"""Version policies, labels, retries and reloads, on real models in this process."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import get_model_status_pb2, model_pb2

from serving import loader
from serving.config import ModelConfig, VersionPolicy, format_model_config
from serving.loader import LoadSettings, Model
from serving.manager import ModelManager
from serving.status import RequestError
from serving.versions import find_versions
from tests.serving.waiting import wait_for
from trainer.fingerprint import FINGERPRINT_FILE, Fingerprint

State = get_model_status_pb2.ModelVersionStatus
ALL = VersionPolicy(limit=None)
NO_RETRY = LoadSettings(max_num_retries=0)


def latest(number):
    return VersionPolicy(limit=number)


def specific(*versions):
    return VersionPolicy(limit=None, only=frozenset(versions))


class World:
    """One model, `echo`, whose versions tests put into place and damage."""

    def __init__(self, root, versions):
        self.base_path = root / "echo"
        self.base_path.mkdir()
        self._versions = versions

    def add(self, *versions):
        for version in versions:
            shutil.copytree(self._versions / str(version), self.base_path / f".{version}")
            (self.base_path / f".{version}").rename(self.base_path / str(version))

    def damage(self, version):
        (self.base_path / str(version) / "variables" / "variables.index").write_bytes(b"damaged")

    def repair(self, version):
        shutil.copy(
            self._versions / str(version) / "variables" / "variables.index",
            self.base_path / str(version) / "variables",
        )

    def remove(self, version):
        shutil.rmtree(self.base_path / str(version))

    def config(self, policy=VersionPolicy(), **labels):  # noqa: B008  frozen
        return {"echo": ModelConfig("echo", self.base_path, policy, labels)}


@pytest.fixture
def world(tmp_path, echo_versions):
    return World(tmp_path, echo_versions)


def spec(version=None, label=None, name="echo"):
    result = model_pb2.ModelSpec(name=name)
    if version is not None:
        result.version.value = version
    if label is not None:
        result.version_label = label
    return result


def answer(manager, **kwargs):
    """The version that answers a request."""
    outputs = manager.servable(spec(**kwargs)).predict("which_version", {"x": np.zeros(1, np.float32)})
    return int(outputs["version"][0])


def states(manager):
    return {version: status.state for version, status in manager.statuses(spec()).items()}


def refused(call, code):
    with pytest.raises(RequestError) as caught:
        call()
    assert caught.value.code.name == code
    return str(caught.value)


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        (latest(1), [3]),
        (latest(2), [2, 3]),
        (latest(9), [1, 2, 3]),
        (ALL, [1, 2, 3]),
        (specific(1, 3), [1, 3]),
    ],
    ids=["latest", "latest 2", "latest 9", "all", "specific"],
)
def test_the_policy_chooses_the_versions_and_the_newest_answers_by_default(world, policy, served):
    world.add(1, 2, 3)
    manager = ModelManager()
    manager.load(world.config(policy))
    assert [
        version for version, state in sorted(states(manager).items()) if state == State.AVAILABLE
    ] == served
    assert answer(manager) == served[-1]
    assert [answer(manager, version=version) for version in served] == served
    for version in {1, 2, 3} - set(served):
        assert f"version {version}" in refused(lambda v=version: answer(manager, version=v), "NOT_FOUND")


def test_a_policy_is_changed_by_a_reload_and_what_both_serve_is_not_loaded_again(world):
    world.add(1, 2, 3)
    manager = ModelManager()
    manager.load(world.config(ALL))
    second = manager.servable(spec(version=2))
    manager.load(world.config(specific(2)))
    assert manager.servable(spec()) is second
    assert states(manager) == {3: State.END, 2: State.AVAILABLE, 1: State.END}
    manager.load(world.config(latest(1)))
    assert answer(manager) == 3
    assert states(manager)[2] == State.END


def test_a_specific_version_that_is_not_there_costs_nothing_that_serves(world):
    world.add(1)
    manager = ModelManager()
    manager.load(world.config())
    manager.load(world.config(specific(7)))
    assert answer(manager) == 1


def test_a_version_that_does_not_load_makes_place_for_the_next_older_one(world):
    world.add(1, 2, 3)
    world.damage(3)
    manager = ModelManager(NO_RETRY)
    manager.load(world.config(latest(2)))
    assert states(manager) == {3: State.END, 2: State.AVAILABLE, 1: State.AVAILABLE}
    failed = manager.statuses(spec(version=3))[3]
    assert failed.code != grpc.StatusCode.OK
    assert failed.message


def test_a_version_whose_signature_names_what_its_graph_lacks_does_not_load(world):
    world.add(1)
    manager = ModelManager(NO_RETRY)
    manager.load(world.config())
    world.add(2)
    file = world.base_path / "2" / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    signature = saved_model.meta_graphs[0].signature_def["which_version"]
    next(iter(signature.outputs.values())).name = "nowhere:0"
    file.write_bytes(saved_model.SerializeToString())
    manager._refresh()
    assert answer(manager) == 1
    assert "nowhere" in manager.statuses(spec())[2].message


def test_a_version_with_a_damaged_fingerprint_does_not_load_until_it_is_repaired(world):
    world.add(1)
    manager = ModelManager(NO_RETRY)
    manager.load(world.config())
    world.add(2)
    fingerprint = Fingerprint({"catalogue": "c1"})
    fingerprint.write(world.base_path / "2")
    file = world.base_path / "2" / FINGERPRINT_FILE
    file.write_text(json.dumps({"id": fingerprint.id, "parts": {"catalogue": "c2"}}))
    manager._refresh()
    assert answer(manager) == 1
    assert "its parts do not give its id" in manager.statuses(spec())[2].message
    fingerprint.write(world.base_path / "2")
    manager._refresh()
    assert answer(manager) == 2
    assert manager.servable(spec()).fingerprint == fingerprint


def test_bundles_of_different_releases_are_served_with_one_warning_until_they_belong_together(
    world, tmp_path, echo_versions, caplog
):
    caplog.set_level("INFO", "serving.manager")

    def warnings():  # TensorFlow has some of its own
        return [
            record.getMessage()
            for record in caplog.records
            if (record.name, record.levelname) == ("serving.manager", "WARNING")
        ]

    def add(model, version, catalogue):
        model.add(version)
        Fingerprint({"catalogue": catalogue}).write(model.base_path / str(version))

    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other", echo_versions)
    add(world, 1, "c1")
    add(other, 1, "c1")
    world.add(2)  # no bundle of Funnel's belongs to any other
    policy = specific(1, 3, 4)
    manager = ModelManager()
    manager.load(
        world.config(policy)
        | {"other": ModelConfig("other", other.base_path, policy)}
        | {"plain": ModelConfig("plain", world.base_path, specific(2))}
    )
    assert "mixed releases" not in caplog.text
    add(world, 3, "c2")
    for _ in range(2):
        manager._refresh()
        assert (answer(manager), answer(manager, name="other")) == (3, 1)
    (warning,) = warnings()
    assert "bundles 'echo' and 'other' do not belong together: their catalogue differs (c2 and c1)" in warning
    add(other, 3, "c3")  # still mixed, though it is told in other words
    manager._refresh()
    assert warnings() == [warning]
    assert "belong together again" not in caplog.text
    add(world, 4, "c3")
    manager._refresh()
    assert "the bundles belong together again" in caplog.text
    # A config at the start is looked at as a swap is.
    caplog.clear()
    ModelManager().load(
        world.config(specific(1)) | {"other": ModelConfig("other", other.base_path, specific(3))}
    )
    assert "mixed releases" in caplog.text


def test_a_version_is_tried_again_as_often_as_asked_and_once_its_files_change(world, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("serving.loader.time.monotonic", lambda: clock[0])
    world.add(1, 2)
    world.damage(2)
    manager = ModelManager(LoadSettings(max_num_retries=1, retry_interval_s=60.0))
    manager.load(world.config())
    assert states(manager) == {2: State.LOADING, 1: State.AVAILABLE}  # a try is left
    tries = []
    monkeypatch.setattr(
        "serving.loader.Model._load", lambda self, version, path, *, is_last_try: tries.append(version)
    )
    clock[0] = 59.0
    manager._refresh()
    assert tries == []
    clock[0] = 61.0
    manager._refresh()
    assert tries == [2]
    clock[0] = 1000.0
    manager._refresh()
    assert tries == [2]
    world.repair(2)
    manager._refresh()
    assert tries == [2, 2]


def test_a_version_that_was_taken_away_goes_and_the_last_one_stays(world):
    world.add(1, 2)
    manager = ModelManager()
    manager.load(world.config())
    world.remove(2)
    manager._refresh()
    assert answer(manager) == 1
    assert states(manager) == {1: State.AVAILABLE}
    world.remove(1)
    manager._refresh()
    assert answer(manager) == 1


def test_only_folders_named_by_an_int64_are_versions(world):
    world.add(1)
    for name in ("1e3", "-2", "²", str(2**63), "9" * 200, "v2"):
        shutil.copytree(world.base_path / "1", world.base_path / name)
    manager = ModelManager()
    manager.load(world.config(ALL))
    assert list(states(manager)) == [1]


@pytest.mark.parametrize("names", [("1", "01", "001"), ("001", "01", "1")], ids=["first", "last"])
def test_of_two_folders_with_one_number_the_plainly_named_one_is_served_with_one_warning(
    world, monkeypatch, caplog, names
):
    world.add(1)
    for name in ("01", "001"):
        shutil.copytree(world.base_path / "1", world.base_path / name)
    monkeypatch.setattr(Path, "iterdir", lambda self: (self / name for name in names))
    for _ in range(2):  # the poller looks every second
        assert find_versions(world.base_path) == {1: world.base_path / "1"}
    warnings = sorted(record.getMessage() for record in caplog.records)
    assert len(warnings) == 2
    for warning, name in zip(warnings, ("001", "01"), strict=True):
        assert f"{world.base_path / '1'} " in warning
        assert f"{world.base_path / name} " in warning


def test_the_memory_of_a_version_is_free_once_it_is_replaced_and_its_requests_are_done(world):
    world.add(1)
    manager = ModelManager()
    manager.load(world.config())
    first = weakref.ref(manager.servable(spec()))
    gc.disable()  # a big index must not wait for a collection that may be minutes away
    try:
        world.add(2)
        manager._refresh()
        assert answer(manager) == 2
        assert first() is None
    finally:
        gc.enable()


def test_no_graph_stays_of_versions_that_were_replaced_or_did_not_load(world, monkeypatch):
    # What pytest records of it would hold the frames of the failure.
    monkeypatch.setattr(loader.logger, "exception", lambda *args: None)

    def num_graphs() -> int:
        return sum(isinstance(value, tf.Graph) for value in gc.get_objects())

    world.add(1)
    manager = ModelManager()
    manager.load(world.config())
    world.add(2)
    gc.disable()  # left to itself the collector may not come for hours
    try:
        manager._refresh()
        before = num_graphs()
        world.add(3)
        world.add(4)
        world.damage(4)
        manager._refresh()
        assert answer(manager) == 3
        assert num_graphs() == before
    finally:
        gc.enable()


def test_labels_name_loaded_versions_and_move_only_to_loaded_ones(world):
    world.add(1, 2)
    manager = ModelManager()
    assert "--allow_version_labels" in refused(
        lambda: manager.load(world.config(ALL, stable=1)), "FAILED_PRECONDITION"
    )
    manager.load(world.config(specific(1)))
    manager.load(world.config(specific(1), stable=1))
    assert answer(manager, label="stable") == 1
    assert list(manager.statuses(spec(label="stable"))) == [1]
    assert "label: canary" in refused(lambda: answer(manager, label="canary"), "INVALID_ARGUMENT")

    refused(lambda: manager.load(world.config(specific(2), stable=2)), "FAILED_PRECONDITION")
    assert answer(manager) == 1  # a refused config changes nothing
    manager.load(world.config(ALL, stable=1))
    manager.load(world.config(specific(2), stable=2))
    assert answer(manager, label="stable") == 2


def test_new_labels_may_come_before_their_version_when_that_is_allowed_but_not_move(world):
    world.add(1)
    manager = ModelManager(allow_labels_before_loading=True)
    manager.load(world.config(ALL, stable=1, canary=2))
    assert answer(manager, label="stable") == 1
    refused(lambda: answer(manager, label="canary"), "NOT_FOUND")
    refused(lambda: manager.load(world.config(ALL, stable=2)), "FAILED_PRECONDITION")
    world.add(2)
    manager._refresh()
    assert answer(manager, label="canary") == 2


def labelled(world):
    """A manager of versions 1 and 2, of which 1 is the stable one."""
    world.add(1, 2)
    manager = ModelManager()
    manager.load(world.config(ALL))
    manager.load(world.config(ALL, stable=1))
    return manager


def test_a_label_that_moves_answers_while_the_other_models_of_the_config_load(
    world, echo_versions, monkeypatch
):
    manager = labelled(world)
    load = Model._load
    answers = []

    def ask():
        answers.append(answer(manager, label="stable"))

    def asked(self, version, path, *, is_last_try):
        ask()
        return load(self, version, path, is_last_try=is_last_try)

    monkeypatch.setattr("serving.loader.Model._load", asked)
    monkeypatch.setattr("serving.loader._free_memory", ask)  # the last step of unloading
    manager.load({**world.config(specific(2), stable=2), "other": ModelConfig("other", echo_versions)})
    assert answers == [1, 2]
    assert states(manager) == {2: State.AVAILABLE, 1: State.END}
    refused(lambda: answer(manager, version=1), "NOT_FOUND")
    assert answer(manager, name="other") == 4


def test_a_config_whose_loading_breaks_off_leaves_versions_and_labels_as_they_were(
    world, echo_versions, monkeypatch
):
    manager = labelled(world)
    new = {**world.config(specific(2), stable=2), "other": ModelConfig("other", echo_versions)}
    with monkeypatch.context() as patch:
        patch.setattr("serving.loader.Model._load", lambda *args, **kwargs: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            manager.load(new)
    for look in (lambda: None, manager._refresh):
        look()
        assert answer(manager, label="stable") == 1
        assert [answer(manager, version=version) for version in (1, 2)] == [1, 2]
        assert not manager.is_served("other")
    manager.load(new)
    assert answer(manager, label="stable") == 2
    assert states(manager) == {2: State.AVAILABLE, 1: State.END}


def test_a_reload_serves_what_it_names_and_only_that(world, tmp_path, echo_versions):
    world.add(1)
    manager = ModelManager(NO_RETRY)
    manager.load(world.config())
    other = {"other": ModelConfig("other", echo_versions)}
    manager.load(world.config() | other)
    assert answer(manager, name="other") == 4
    manager.load(other)
    refused(lambda: answer(manager), "NOT_FOUND")
    assert answer(manager, name="other") == 4

    missing = {"missing": ModelConfig("missing", tmp_path / "missing")}
    assert "'missing'" in refused(lambda: manager.load(other | missing), "UNKNOWN")
    assert answer(manager, name="other") == 4
    refused(lambda: answer(manager, name="missing"), "NOT_FOUND")
    assert "any versions" in refused(lambda: manager.statuses(spec(name="missing")), "NOT_FOUND")
    shutil.copytree(world.base_path, tmp_path / "missing")
    manager._refresh()
    assert answer(manager, name="missing") == 1


def test_a_model_whose_base_path_changes_serves_the_old_one_until_the_new_one_is_loaded(world, echo_versions):
    world.add(1)
    manager = ModelManager(NO_RETRY)
    manager.load(world.config())
    nowhere = world.base_path.parent
    assert "'echo'" in refused(lambda: manager.load({"echo": ModelConfig("echo", nowhere)}), "UNKNOWN")
    assert answer(manager) == 1
    manager.load({"echo": ModelConfig("echo", echo_versions)})
    assert answer(manager) == 4


def test_the_labels_of_a_new_base_path_are_not_checked_against_the_versions_of_the_old_one(
    world, echo_versions
):
    world.add(1)
    moved = {"echo": ModelConfig("echo", echo_versions, labels={"stable": 1})}
    manager = ModelManager()
    manager.load(world.config())
    manager.load(world.config(stable=1))
    old = manager.servable(spec())
    assert "stable" in refused(lambda: manager.load(moved), "FAILED_PRECONDITION")
    assert manager.servable(spec()) is manager.servable(spec(label="stable")) is old
    manager.load({"echo": ModelConfig("echo", echo_versions)})
    manager.load({"echo": ModelConfig("echo", echo_versions, labels={"stable": 4})})
    assert answer(manager, label="stable") == 4

    manager = ModelManager(allow_labels_before_loading=True)
    manager.load(world.config(stable=1))
    manager.load(moved)
    assert answer(manager) == 4
    refused(lambda: answer(manager, label="stable"), "NOT_FOUND")


def test_a_base_path_that_does_not_load_is_tried_as_often_as_asked_and_taken_once_it_loads(
    world, tmp_path, echo_versions, monkeypatch
):
    clock = [0.0]
    monkeypatch.setattr("serving.loader.time.monotonic", lambda: clock[0])
    world.add(1)
    config_file = tmp_path / "models.config"
    manager = ModelManager(LoadSettings(max_num_retries=1, retry_interval_s=60.0))
    manager.load(world.config())
    (tmp_path / "new").mkdir()
    new = World(tmp_path / "new", echo_versions)
    new.add(1, 2)
    new.damage(1)
    new.damage(2)
    config_file.write_text(format_model_config({"echo": new.base_path}))
    tries = []
    load = Model._load

    def counted(self, version, path, *, is_last_try):
        tries.append(version)
        return load(self, version, path, is_last_try=is_last_try)

    monkeypatch.setattr("serving.loader.Model._load", counted)
    for time_s, expected in ((0.0, [2, 1]), (59.0, [2, 1]), (61.0, [2, 1] * 2), (1000.0, [2, 1] * 2)):
        clock[0] = time_s
        manager._reload(config_file)
        manager._refresh()
        assert tries == expected
    assert answer(manager) == 1
    assert states(manager) == {2: State.END, 1: State.AVAILABLE}
    assert all(status.message for status in manager.statuses(spec()).values())
    new.repair(2)
    manager._refresh()
    assert answer(manager) == 2
    assert manager.statuses(spec())[2].message == ""


def test_a_folder_that_cannot_be_read_costs_the_other_models_nothing(world, echo_versions, monkeypatch):
    world.add(1)
    manager = ModelManager(NO_RETRY)
    manager.load(world.config())

    def find(path):
        if path == world.base_path:
            raise PermissionError(13, "Permission denied", str(path))
        return find_versions(path)

    other = {"other": ModelConfig("other", echo_versions)}
    with monkeypatch.context() as patch:
        patch.setattr("serving.loader.find_versions", find)
        text = refused(lambda: manager.load(world.config(latest(2), stable=1) | other), "UNKNOWN")
    assert "'echo'" in text
    assert "Permission denied" in text
    assert answer(manager, label="stable") == 1
    assert answer(manager, name="other") == 4
    world.add(2)
    manager._refresh()
    assert [answer(manager, version=version) for version in (1, 2)] == [1, 2]


def test_a_polled_config_with_a_model_that_has_no_version_is_survived_and_its_correction_taken(
    world, tmp_path, echo_versions, caplog
):
    world.add(1)
    manager = ModelManager(NO_RETRY)
    manager.load(world.config())
    config_file = tmp_path / "models.config"
    config_file.write_text(format_model_config({"echo": world.base_path, "new": tmp_path / "nowhere"}))
    manager.start_polling_config(config_file, 0.01)
    try:
        wait_for(lambda: "cannot take over" in caplog.text)
        assert manager.serving_versions() == [("echo", 1)]
        config_file.write_text(format_model_config({"echo": world.base_path, "new": echo_versions}))
        wait_for(lambda: manager.serving_versions() == [("echo", 1), ("new", 4)])
    finally:
        manager.close()


def test_what_a_poller_does_not_expect_does_not_end_it(caplog):
    manager = ModelManager()
    looks = []

    def look():
        looks.append(1)
        raise ZeroDivisionError

    manager._start("poller", 0.01, look)
    wait_for(lambda: len(looks) > 1)
    manager.close()
    assert "poller failed" in caplog.text
