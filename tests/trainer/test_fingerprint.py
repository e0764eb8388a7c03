"""What a bundle was made of: its file, what does not belong together, and what changes a hash."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from schema.errors import BundleError
from trainer.fingerprint import (
    CATALOGUE,
    FINGERPRINT_FILE,
    INDEX,
    RANKER,
    Fingerprint,
    check_together,
    hash_arrays,
    hash_catalogue,
    hash_folder,
    hash_variables,
)
from trainer.run_bundles import BundleFolders, build

OF_RETRIEVAL = Fingerprint({CATALOGUE: "c1", INDEX: "i1"})


def test_a_fingerprint_survives_its_file(tmp_path: Path) -> None:
    OF_RETRIEVAL.write(tmp_path)
    assert Fingerprint.read(tmp_path) == OF_RETRIEVAL


def test_the_id_is_that_of_all_parts_whatever_their_order() -> None:
    assert OF_RETRIEVAL.id == Fingerprint({INDEX: "i1", CATALOGUE: "c1"}).id
    others = [{CATALOGUE: "c1"}, {CATALOGUE: "c1", INDEX: "i2"}, {CATALOGUE: "c1", RANKER: "i1"}]
    assert len({OF_RETRIEVAL.id, *(Fingerprint(parts).id for parts in others)}) == 4


def test_a_bundle_without_a_fingerprint_is_told(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no fingerprint .* older version of Funnel"):
        Fingerprint.read(tmp_path)


def with_another_part(content: bytes) -> bytes:
    value = json.loads(content)
    value["parts"][CATALOGUE] = "c2"
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "damage",
    [
        with_another_part,
        lambda content: content[:20],
        lambda content: b"",
        lambda content: b"\xff" + content,
        lambda content: b"[]",
        lambda content: b'{"id": "1"}',
        lambda content: b'{"id": "1", "parts": 3}',
    ],
    ids=["another part", "cut", "empty", "not UTF-8", "list", "no parts", "parts of another type"],
)
def test_a_damaged_fingerprint_is_refused_and_its_file_named(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    OF_RETRIEVAL.write(tmp_path)
    file = tmp_path / FINGERPRINT_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BundleError, match=r"fingerprint\.json is damaged"):
        Fingerprint.read(tmp_path)


def test_bundles_that_share_no_part_or_agree_on_it_belong_together() -> None:
    of_ranking = Fingerprint({CATALOGUE: "c1", RANKER: "r1"})
    check_together({"retrieval": OF_RETRIEVAL, "ranking": of_ranking, "other": Fingerprint({RANKER: "r1"})})
    check_together({})


def test_of_bundles_that_differ_both_are_named_with_the_part() -> None:
    bundles = {
        "retrieval": OF_RETRIEVAL,
        "old": Fingerprint({RANKER: "r1"}),
        "ranking": Fingerprint({RANKER: "r2"}),
    }
    with pytest.raises(BundleError, match=r"'old' and 'ranking' do not .* ranker differs \(r1 and r2\)"):
        check_together(bundles)


def test_bundles_of_two_runs_are_not_built_into_one(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("retrieval", "ranking")]
    for folder, fingerprint in zip(folders, (OF_RETRIEVAL, Fingerprint({CATALOGUE: "c2"})), strict=True):
        folder.mkdir()
        fingerprint.write(folder)
    targets = BundleFolders(*(tmp_path / name for name in ("exact", "funnel", "funnel_exact")))
    with pytest.raises(BundleError, match="their catalogue differs"):
        build(*folders, [], targets)
    assert not any(path.exists() for path in (targets.retrieval_exact, targets.funnel, targets.funnel_exact))


ARRAYS: dict[str, Any] = {"a": np.arange(6, dtype=np.int32), "b": np.array(["x", "y"], object)}


def test_a_hash_of_arrays_does_not_hang_on_their_order() -> None:
    assert hash_arrays(ARRAYS) == hash_arrays(dict(reversed(ARRAYS.items())))
    # Memory in another order holds the same values.
    values = np.arange(6.0).reshape(2, 3)
    assert hash_arrays({"a": np.asfortranarray(values)}) == hash_arrays({"a": values})


@pytest.mark.parametrize(
    "change",
    [
        {"a": np.array([0, 1, 2, 3, 4, 6], np.int32)},
        {"a": np.arange(6, dtype=np.int64)},
        {"a": np.arange(6, dtype=np.int32).reshape(2, 3)},
        {"b": np.array(["y", "x"], object)},
        {"b": np.array(["xy", ""], object)},
        {"c": np.zeros(0)},
    ],
    ids=["value", "dtype", "shape", "order of texts", "where texts end", "one more"],
)
def test_whatever_changes_in_an_array_changes_the_hash(change: dict[str, Any]) -> None:
    assert hash_arrays(ARRAYS | change) != hash_arrays(ARRAYS)


def test_weights_are_hashed_by_their_path_and_values() -> None:
    def weights(**values: list[float]) -> str:
        variables: Any = {
            name: SimpleNamespace(numpy=lambda v=value: np.array(v, np.float32))
            for name, value in values.items()
        }
        return hash_variables(variables)

    assert weights(a=[1.0], b=[2.0]) == weights(b=[2.0], a=[1.0])
    assert weights(a=[1.0], b=[2.0]) != weights(a=[2.0], b=[1.0])


def catalogue(**changes: Any) -> Any:
    values = {
        "item_ids": np.array([b"i1", b"i2"], object),
        "transformed": {"tag": np.array([[1], [2]], np.int64)},
        "counters": {"clicks": np.array([0.0, 3.0], np.float32)},
        "upload_time_unix_s": None,
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    "change",
    [
        {"item_ids": np.array([b"i2", b"i1"], object)},
        {"transformed": {"tag": np.array([[1], [3]], np.int64)}},
        {"counters": {"clicks": np.array([0.0, 4.0], np.float32)}},
        {"upload_time_unix_s": np.array([1, 2], np.int64)},
    ],
    ids=["order of items", "feature", "counter", "upload time"],
)
def test_a_catalogue_is_another_by_its_order_and_by_each_thing_known_of_an_item(
    change: dict[str, Any],
) -> None:
    assert hash_catalogue(catalogue()) == hash_catalogue(catalogue())
    assert hash_catalogue(catalogue(**change)) != hash_catalogue(catalogue())


def test_a_folder_is_hashed_by_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> str:
        for file, content in files.items():
            path = tmp_path / name / file.replace("_", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return hash_folder(tmp_path / name)

    first = folder("first", a="1", sub_b="2")
    assert folder("same", sub_b="2", a="1") == first
    others = [
        folder("moved", a="1", b="2"),
        folder("changed", a="1", sub_b="3"),
        folder("shifted", a="12", sub_b=""),
    ]
    assert len({first, *others}) == 4
