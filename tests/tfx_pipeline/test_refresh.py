"""Newer items: what counts as new, changed or gone, and what is refused before anything is published."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import yaml

from schema.contract import DatasetSpec
from schema.errors import BundleError, CheckpointError, DataError, IndexBuildError, ServingError
from schema.point_in_time import count_names, log_count_names
from schema.tables import read_items
from tests.tfx_pipeline import taste_world
from tfx_pipeline import refresh
from tfx_pipeline.config import BUNDLES, MODELS, RANKING, RETRIEVAL, RunPaths, load_run_config
from tfx_pipeline.refresh import (
    compare,
    encode_items,
    read_catalogue,
    refresh_index,
    with_counts,
    write_catalogue,
)
from tfx_pipeline.run_result import RunResult
from trainer.fingerprint import Fingerprint

SPEC = DatasetSpec.model_validate(yaml.safe_load(taste_world.CONFIG)["dataset"])
NOW = 1_700_000_000
SOURCE: dict[str, list[Any]] = {
    "video": ["v1", "v2", "v3"],
    "tags": ["all|taste-0", "all|taste-1", None],
    "title": ["one", "two", None],
}


def items_file(folder: Path, **changes: list[Any]) -> Path:
    path = folder / "items.parquet"
    pl.DataFrame(SOURCE | changes).write_parquet(path)
    return path


LOG = [1.0] * len(log_count_names(SPEC))
UNMET = LOG + [0.0] * (len(count_names(SPEC)) - len(LOG))


def counted(items: pl.DataFrame) -> pl.DataFrame:
    return items.with_columns(pl.Series("item_counts", [UNMET] * len(items), dtype=pl.List(pl.Float32)))


def encoded(folder: Path, **changes: list[Any]) -> dict[str, bytes]:
    return encode_items(counted(read_items(SPEC, [items_file(folder, **changes)])), SPEC, NOW)


def test_known_items_keep_their_counts_and_new_ones_have_none(tmp_path: Path) -> None:
    items = read_items(SPEC, [items_file(tmp_path)])
    counts = [LOG + [float(row)] * (len(UNMET) - len(LOG)) for row in range(3)]
    known = items.with_columns(pl.Series("item_counts", counts, dtype=pl.List(pl.Float32)))
    newer = read_items(SPEC, [items_file(tmp_path, video=["v3", "v9", "v2"])])
    found = with_counts(newer, encode_items(known, SPEC, NOW), SPEC)
    assert found["item_counts"].to_list() == [counts[2], UNMET, counts[1]]


@pytest.fixture
def before(tmp_path: Path) -> dict[str, bytes]:
    return encoded(tmp_path)


def test_the_same_items_in_any_order_are_no_change(tmp_path: Path, before: dict[str, bytes]) -> None:
    reverse = {name: column[::-1] for name, column in SOURCE.items()}
    after = encoded(tmp_path, **reverse)
    assert list(after) == ["v3", "v2", "v1"]
    assert not compare(before, after)


@pytest.mark.parametrize(
    "changes",
    [
        {"tags": ["all|taste-0", "all|taste-3", None]},
        {"title": ["one", "2", None]},
        {"tags": [None, "x", None]},
    ],
)
def test_another_feature_or_title_is_a_change(
    tmp_path: Path, before: dict[str, bytes], changes: dict[str, list[Any]]
) -> None:
    change = compare(before, encoded(tmp_path, **changes))
    assert (change.added, change.removed) == ((), ())
    assert "v2" in change.changed and "v3" not in change.changed


def test_new_and_absent_items_are_told_apart(tmp_path: Path, before: dict[str, bytes]) -> None:
    change = compare(before, encoded(tmp_path, video=["v1", "v9", "v3"]))
    assert (change.added, change.changed, change.removed) == (("v9",), (), ("v2",))


def test_a_catalogue_survives_its_file(tmp_path: Path, before: dict[str, bytes]) -> None:
    write_catalogue(before, tmp_path / "catalogue.gz")
    assert read_catalogue([str(tmp_path / "catalogue.gz")]) == before


def test_the_same_items_with_the_counts_of_before_are_no_change(
    tmp_path: Path, before: dict[str, bytes]
) -> None:
    items = with_counts(read_items(SPEC, [items_file(tmp_path)]), before, SPEC)
    assert not compare(before, encode_items(items, SPEC, NOW))


def test_values_are_those_valid_at_the_moment(tmp_path: Path) -> None:
    columns = {**SPEC.items.columns, "valid_from_unix_s": "since"}
    items = SPEC.items.model_dump() | {"columns": columns}
    spec = DatasetSpec.model_validate(SPEC.model_dump() | {"items": items})
    path = items_file(tmp_path, video=["v1", "v1", "v1"], since=[NOW - 20, NOW - 10, NOW + 10])
    table = counted(read_items(spec, [path]))
    assert b"two" in encode_items(table, spec, NOW)["v1"]
    assert b"one" in encode_items(table, spec, NOW - 15)["v1"]


@pytest.fixture
def run(tmp_path: Path) -> RunResult:
    """A finished run of the taste world, of which only the folders matter here."""
    config = load_run_config(taste_world.write(tmp_path / "world"))
    return RunResult(
        dataset=config.dataset.name,
        config_json=config.model_dump_json(),
        tables_dir=str(tmp_path / "data"),
        user_states=str(tmp_path / "user_states"),
        blessed=dict.fromkeys(MODELS, True),
        pushed=dict.fromkeys(MODELS, "1"),
        reasons={RANKING: "auc 0.5, required: at least 0.7"},
        report="report.html",
        timings=(),
    )


def push(paths: RunPaths, *models: str) -> None:
    for model in models:
        folder = paths.serving_models / model / "1"
        folder.mkdir(parents=True)
        Fingerprint({}).write(folder)


def test_without_a_pushed_pair_nothing_can_be_refreshed(run: RunResult, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    push(paths, RETRIEVAL)
    with pytest.raises(ServingError, match=r"no ranking model was pushed to .*: auc 0\.5, required"):
        refresh_index(run, paths, [items_file(tmp_path)], complete=False)


def test_a_model_pushed_by_an_older_version_is_told(run: RunResult, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    push(paths, *BUNDLES)
    with pytest.raises(CheckpointError, match="exported by an older version of Funnel"):
        refresh_index(run, paths, [items_file(tmp_path)], complete=False)
    assert os.listdir(paths.serving_models / RETRIEVAL) == ["1"]


@pytest.fixture
def with_checkpoints(monkeypatch: pytest.MonkeyPatch) -> dict[str, DatasetSpec]:
    """Pushed models have checkpoints that declare these datasets, and an empty catalogue."""
    specs = dict.fromkeys(MODELS, SPEC)

    class Stub:
        def __init__(self, spec: DatasetSpec) -> None:
            self.spec = spec
            # Of its Transform graph the item vocabulary alone is read.
            self.transform_output = SimpleNamespace(vocabulary_by_name=lambda space: [b"v1", b"v2", b"v9"])

    monkeypatch.setattr(refresh, "read_checkpoint", lambda folder: Stub(specs[folder.parent.name]))
    monkeypatch.setattr(refresh, "catalogue_files", lambda folder: [])
    return specs


def test_bundles_of_different_runs_are_not_refreshed(
    run: RunResult, tmp_path: Path, with_checkpoints: dict[str, DatasetSpec]
) -> None:
    paths = RunPaths(tmp_path / "run")
    push(paths, *BUNDLES)
    for name, catalogue in ((RETRIEVAL, "c1"), (RANKING, "c2")):
        Fingerprint({"catalogue": catalogue}).write(paths.serving_models / name / "1")
    with pytest.raises(
        BundleError, match="'retrieval' and 'ranking' do not belong together: their catalogue"
    ):
        refresh_index(run, paths, [items_file(tmp_path)], complete=False)


@pytest.mark.parametrize("failing", ["run_retrieval.refresh", "run_ranking.refresh", "validate_serving"])
def test_a_refresh_that_fails_publishes_nothing_and_leaves_nothing(
    run: RunResult,
    tmp_path: Path,
    with_checkpoints: dict[str, DatasetSpec],
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    before = encoded(tmp_path, video=["v1", "v2", "v9"])
    monkeypatch.setattr(refresh, "read_catalogue", lambda files: before)
    monkeypatch.setattr(refresh, "read_user_states", lambda *_: [])
    monkeypatch.setattr(refresh, "choose_users", lambda *_: [])
    monkeypatch.setattr(refresh, "add_warmup_requests", lambda *_: None)
    monkeypatch.setattr(refresh, "_remember_origin", lambda *_: None)
    done = []

    def export(name: str) -> Callable[..., None]:
        def step(pushed: Path, catalogue: list[str], users: list[str], target: Path) -> None:
            target.mkdir()
            done.append(name)
            if name == failing:
                raise IndexBuildError("the disk is full")

        return step

    def validate(*_: Any) -> None:
        done.append("validate_serving")
        raise IndexBuildError("the disk is full")

    def build(retrieval: Path, ranking: Path, users: list[str], folders: Any) -> None:
        for folder in dataclasses.asdict(folders).values():
            folder.mkdir()

    monkeypatch.setattr(refresh.run_retrieval, "refresh", export("run_retrieval.refresh"))
    monkeypatch.setattr(refresh.run_ranking, "refresh", export("run_ranking.refresh"))
    monkeypatch.setattr(refresh.run_bundles, "build", build)
    monkeypatch.setattr(refresh, "validate_serving", validate)
    paths = RunPaths(tmp_path / "run")
    push(paths, *BUNDLES)
    with pytest.raises(IndexBuildError, match="the disk is full"):
        refresh_index(run, paths, [items_file(tmp_path)], complete=False)
    assert done[-1] == failing
    assert [os.listdir(paths.serving_models / name) for name in BUNDLES] == [["1"]] * len(BUNDLES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": ["v1", None, "v3"]}, r"items\.item_id: 1 rows have no value, the first is row 2"),
        ({"video": ["v1", "v1", "v3"]}, r"items: 2 rows share their item_id with another row \(.*v1\)"),
    ],
)
def test_items_that_break_the_contract_are_refused(
    run: RunResult,
    tmp_path: Path,
    with_checkpoints: dict[str, DatasetSpec],
    changes: dict[str, list[Any]],
    message: str,
) -> None:
    paths = RunPaths(tmp_path / "run")
    push(paths, *BUNDLES)
    with pytest.raises(DataError, match=message):
        refresh_index(run, paths, [items_file(tmp_path, **changes)], complete=True)


def test_a_column_that_is_not_there_is_named(
    run: RunResult, tmp_path: Path, with_checkpoints: dict[str, DatasetSpec]
) -> None:
    paths = RunPaths(tmp_path / "run")
    push(paths, *BUNDLES)
    path = tmp_path / "items.csv"
    path.write_text("video,title\nv1,one\n")
    with pytest.raises(DataError, match=r"items\.csv has no column 'tags'; it has: video, title"):
        refresh_index(run, paths, [path], complete=False)


def test_models_with_other_item_features_are_no_pair(
    run: RunResult, tmp_path: Path, with_checkpoints: dict[str, DatasetSpec]
) -> None:
    paths = RunPaths(tmp_path / "run")
    push(paths, *BUNDLES)
    items = SPEC.items.model_dump() | {"features": []}
    with_checkpoints[RANKING] = DatasetSpec.model_validate(SPEC.model_dump() | {"items": items})
    with pytest.raises(DataError, match=r"runs with different item features \(tags\)"):
        refresh_index(run, paths, [items_file(tmp_path)], complete=False)
