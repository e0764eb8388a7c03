"""Official archives: local copies, safe unpacking, MovieLens conversion, and the two declarations."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest

from schema.contract import load_dataset_spec
from schema.errors import ConfigError, DataError
from schema.tables import prepare_tables, read_summary
from tfx_pipeline.datasets import archives
from tfx_pipeline.datasets.archives import ARCHIVES, prepare_source

SHARED = Path(os.environ.get("FUNNEL_SHARED_DIR", Path(__file__).parents[3] / "shared")) / "data"

KUAIRAND = {
    "KuaiRand-Pure/data/log_standard_4_22_to_5_08_pure.csv": b"user_id,video_id\n1,2\n",
    "KuaiRand-Pure/data/user_features_pure.csv": b"user_id\n1\n",
    "KuaiRand-Pure/data/video_features_basic_pure.csv": b"video_id\n2\n",
    "KuaiRand-Pure/data/video_features_statistic_pure.csv": b"video_id,play_cnt\n2,9\n",
}
MOVIELENS = {
    "ml-1m/README": b"terms\n",
    "ml-1m/ratings.dat": b"1::10::5::978300760\n2::11::3::978300700\n1::11::4::978300760\n",
    "ml-1m/users.dat": b"1::F::1::10::02139\n2::M::56::16::98107-2117\n",
    "ml-1m/movies.dat": b"10::Mis\xe9rables, Les (1995)::Drama|Musical\n"
    b'11::2001: A "Space" Odyssey (1968)::Sci-Fi\n',
}


def make_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def files_under(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "data-dir").mkdir()
    return tmp_path / "data-dir"


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# Where a local copy may lie.


def test_subset_archive_in_a_folder_is_unpacked_to_the_needed_files_only(
    data_dir: Path, cache_dir: Path
) -> None:
    make_tar(data_dir / "KuaiRand-Pure-subset.tar.gz", KUAIRAND)
    source = prepare_source("kuairand-pure", data_dir, cache_dir)
    assert files_under(source) == {
        "data/log_standard_4_22_to_5_08_pure.csv",
        "data/user_features_pure.csv",
        "data/video_features_basic_pure.csv",
    }
    assert (source / "data/user_features_pure.csv").read_bytes() == b"user_id\n1\n"
    assert files_under(data_dir) == {"KuaiRand-Pure-subset.tar.gz"}


def test_archive_file_of_any_name_is_taken_with_a_warning(
    data_dir: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_tar(data_dir / "mine.tar.gz", {f"./{name}": content for name, content in KUAIRAND.items()})
    with caplog.at_level(logging.WARNING):
        source = prepare_source("kuairand-pure", path, cache_dir)
    assert (source / "data/user_features_pure.csv").is_file()
    assert "not the official archive" in caplog.text


@pytest.mark.parametrize("below", ["", "KuaiRand-Pure"], ids=["folder above", "folder itself"])
def test_extracted_kuairand_is_read_in_place(data_dir: Path, cache_dir: Path, below: str) -> None:
    write_files(data_dir, KUAIRAND)
    assert prepare_source("kuairand-pure", data_dir / below, cache_dir) == data_dir / "KuaiRand-Pure"
    assert not cache_dir.exists()


@pytest.mark.parametrize("below", ["", "ml-1m"], ids=["folder above", "folder itself"])
def test_extracted_movielens_is_converted_into_the_cache(data_dir: Path, cache_dir: Path, below: str) -> None:
    write_files(data_dir, MOVIELENS)
    source = prepare_source("movielens-1m", data_dir / below, cache_dir)
    assert files_under(source) == {"interactions.parquet", "users.parquet", "items.parquet"}
    assert files_under(data_dir) == set(MOVIELENS)


def test_archive_is_used_when_the_extracted_files_are_incomplete(data_dir: Path, cache_dir: Path) -> None:
    write_files(data_dir, {"KuaiRand-Pure/data/user_features_pure.csv": b"half"})
    make_tar(data_dir / "KuaiRand-Pure-subset.tar.gz", KUAIRAND)
    source = prepare_source("kuairand-pure", data_dir, cache_dir)
    assert (source / "data/user_features_pure.csv").read_bytes() == b"user_id\n1\n"


def test_without_data_dir_the_official_archive_is_downloaded(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = make_zip(tmp_path / "served.zip", MOVIELENS)
    asked = []

    def fake_download(url: str, destination: Path, checksum: str) -> Path:
        asked.append((url, destination, checksum))
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(official.read_bytes())
        return destination

    checksum = "sha256:" + hashlib.sha256(official.read_bytes()).hexdigest()
    archive = dataclasses.replace(ARCHIVES["movielens-1m"], checksum=checksum)
    monkeypatch.setitem(ARCHIVES, "movielens-1m", archive)
    monkeypatch.setattr(archives, "download", fake_download)
    source = prepare_source("movielens-1m", None, cache_dir)
    assert (source / "items.parquet").is_file()
    url = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    assert asked == [(url, cache_dir / "downloads" / "ml-1m.zip", checksum)]


# Twice, and in the middle.


def test_second_call_finds_the_prepared_folder(data_dir: Path, cache_dir: Path) -> None:
    path = make_zip(data_dir / "copy.zip", MOVIELENS)
    first = prepare_source("movielens-1m", path, cache_dir)
    times = {name: (first / name).stat().st_mtime_ns for name in files_under(first)}
    second = prepare_source("movielens-1m", path, cache_dir)
    assert second == first
    assert {name: (second / name).stat().st_mtime_ns for name in files_under(second)} == times


def test_another_archive_gets_another_folder(data_dir: Path, cache_dir: Path) -> None:
    first = prepare_source("kuairand-pure", make_tar(data_dir / "a.tar.gz", KUAIRAND), cache_dir)
    changed = KUAIRAND | {"KuaiRand-Pure/data/user_features_pure.csv": b"user_id\n7\n"}
    second = prepare_source("kuairand-pure", make_tar(data_dir / "b.tar.gz", changed), cache_dir)
    assert (first / "data/user_features_pure.csv").read_bytes() == b"user_id\n1\n"
    assert (second / "data/user_features_pure.csv").read_bytes() == b"user_id\n7\n"


def test_failed_conversion_leaves_nothing_to_be_picked_up(data_dir: Path, cache_dir: Path) -> None:
    path = make_zip(data_dir / "copy.zip", MOVIELENS | {"ml-1m/ratings.dat": b"1::10::five::978300760\n"})
    with pytest.raises(DataError, match=r"ratings\.dat: ratings and timestamps must be numbers"):
        prepare_source("movielens-1m", path, cache_dir)
    assert files_under(cache_dir) == set()
    assert list((cache_dir / "movielens-1m").iterdir()) == []


# Bad input.


def test_official_name_with_other_content_is_refused(data_dir: Path, cache_dir: Path) -> None:
    path = make_tar(data_dir / "KuaiRand-Pure.tar.gz", KUAIRAND)
    actual = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=f"expected md5 0820331067a3784d9691136f772b35a7, got {actual}"):
        prepare_source("kuairand-pure", data_dir, cache_dir)


def test_folder_without_the_dataset_names_expected_and_found(data_dir: Path, cache_dir: Path) -> None:
    write_files(data_dir, {"ml-1m/ratings.dat": b"", "notes.txt": b""})
    with pytest.raises(DataError) as error:
        prepare_source("movielens-1m", data_dir, cache_dir)
    text = str(error.value)
    assert "missing: users.dat, movies.dat" in text
    assert "found: ml-1m, notes.txt" in text
    assert "https://files.grouplens.org" in text


def test_absent_data_dir_is_named(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        prepare_source("movielens-1m", tmp_path / "nowhere", cache_dir)


def test_unknown_dataset_lists_the_official_ones(cache_dir: Path) -> None:
    with pytest.raises(ConfigError, match="kuairand-pure, movielens-1m"):
        prepare_source("netflix", None, cache_dir)


def test_archive_without_a_needed_file_names_it(data_dir: Path, cache_dir: Path) -> None:
    files = {name: content for name, content in KUAIRAND.items() if "user_features" not in name}
    path = make_tar(data_dir / "mine.tar.gz", files)
    with pytest.raises(DataError, match=r"no regular file KuaiRand-Pure/data/user_features_pure\.csv inside"):
        prepare_source("kuairand-pure", path, cache_dir)


@pytest.mark.parametrize("name", ["copy.zip", "copy.tar.gz"])
def test_truncated_archive_is_called_damaged(data_dir: Path, cache_dir: Path, name: str) -> None:
    noise = {"ml-1m/noise": os.urandom(50_000)}
    make = make_zip if name.endswith(".zip") else make_tar
    path = make(data_dir / name, noise | MOVIELENS)
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(DataError, match="damaged or not a"):
        prepare_source("movielens-1m", path, cache_dir)
    assert files_under(cache_dir) == set()


def test_flipped_byte_inside_a_zip_is_noticed(data_dir: Path, cache_dir: Path) -> None:
    path = data_dir / "copy.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in MOVIELENS.items():
            archive.writestr(name, content)
    path.write_bytes(path.read_bytes().replace(b"::978300700", b"::978300701"))
    with pytest.raises(DataError, match="damaged"):
        prepare_source("movielens-1m", path, cache_dir)


def test_names_that_lead_out_of_the_folder_write_nothing(
    tmp_path: Path, data_dir: Path, cache_dir: Path
) -> None:
    evil = {"../escaped.csv": b"x", str(tmp_path / "absolute.csv"): b"x"}
    source = prepare_source("kuairand-pure", make_tar(data_dir / "mine.tar.gz", evil | KUAIRAND), cache_dir)
    assert len(files_under(source)) == 3
    assert files_under(tmp_path) == {
        "data-dir/mine.tar.gz",
        *(f"{source.relative_to(tmp_path)}/{f}" for f in files_under(source)),
    }


def test_link_in_place_of_a_needed_file_is_not_followed(data_dir: Path, cache_dir: Path) -> None:
    path = data_dir / "mine.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in KUAIRAND.items():
            info = tarfile.TarInfo(name)
            if "user_features" in name:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match="no regular file"):
        prepare_source("kuairand-pure", path, cache_dir)


def test_cache_that_cannot_be_written_says_so(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    path = make_tar(data_dir / "mine.tar.gz", KUAIRAND)
    with pytest.raises(DataError, match=r"cannot write .*cache"):
        prepare_source("kuairand-pure", path, tmp_path / "cache")


# MovieLens as Parquet.


def test_movielens_tables_hold_the_rows_of_the_files_in_order(data_dir: Path, cache_dir: Path) -> None:
    source = prepare_source("movielens-1m", write_files(data_dir, MOVIELENS), cache_dir)
    interactions = pl.read_parquet(source / "interactions.parquet")
    assert interactions.schema == {
        "user_id": pl.String, "item_id": pl.String, "rating": pl.Float32, "timestamp": pl.Int64
    }  # fmt: skip
    assert interactions.rows() == [
        ("1", "10", 5.0, 978300760),
        ("2", "11", 3.0, 978300700),
        ("1", "11", 4.0, 978300760),
    ]
    users = pl.read_parquet(source / "users.parquet").select(
        "user_id", "gender", "age", "occupation", "zip_code"
    )
    assert users.rows() == [("1", "F", "1", "10", "02139"), ("2", "M", "56", "16", "98107-2117")]
    items = pl.read_parquet(source / "items.parquet").select("item_id", "title", "year", "genres")
    assert items.rows() == [
        ("10", "Misérables, Les (1995)", 1995.0, "Drama|Musical"),
        ("11", '2001: A "Space" Odyssey (1968)', 1968.0, "Sci-Fi"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1::10::5\n", r"line 4: expected 4 fields \(user_id::item_id::rating::timestamp\), found 3"),
        (b"1::10::5::978300760::extra\n", "line 4: expected 4 fields .* found 5"),
        (b"1::10::5::yesterday\n", "must be numbers"),
    ],
    ids=["field missing", "field too many", "not a number"],
)
def test_ratings_line_that_does_not_fit_is_refused(
    data_dir: Path, cache_dir: Path, line: bytes, message: str
) -> None:
    write_files(data_dir, MOVIELENS | {"ml-1m/ratings.dat": MOVIELENS["ml-1m/ratings.dat"] + line})
    with pytest.raises(DataError, match=message):
        prepare_source("movielens-1m", data_dir, cache_dir)


def test_empty_ratings_file_is_refused(data_dir: Path, cache_dir: Path) -> None:
    write_files(data_dir, MOVIELENS | {"ml-1m/ratings.dat": b""})
    with pytest.raises(DataError, match=r"ratings\.dat cannot be read"):
        prepare_source("movielens-1m", data_dir, cache_dir)


# The declarations.


@pytest.mark.parametrize(("name", "files"), [("kuairand-pure", KUAIRAND), ("movielens-1m", MOVIELENS)])
def test_prepared_folder_holds_exactly_the_files_that_the_declaration_names(
    data_dir: Path, cache_dir: Path, name: str, files: Mapping[str, bytes]
) -> None:
    spec = load_dataset_spec(name)
    source = prepare_source(name, make_tar(data_dir / "copy.tar.gz", files), cache_dir)
    assert files_under(source) == {*spec.interactions.files, *spec.users.files, *spec.items.files}


def test_no_declared_kuairand_feature_comes_from_after_the_event() -> None:
    spec = load_dataset_spec("kuairand-pure")
    assert not any("statistic" in name for name in (*spec.users.files, *spec.items.files))
    assert "visible_status" not in {feature.source_column for feature in spec.items.features}


def needs(file_name: str) -> Path:
    if not (SHARED / file_name).is_file():
        pytest.skip(f"no {SHARED / file_name}: set FUNNEL_SHARED_DIR to the folder above data/")
    return SHARED


@pytest.mark.slow
def test_real_movielens_tables_have_the_published_counts(tmp_path: Path, cache_dir: Path) -> None:
    source = prepare_source("movielens-1m", needs("ml-1m.zip"), cache_dir)
    tables = prepare_tables(load_dataset_spec("movielens-1m"), source, tmp_path / "tables")
    summary = read_summary(tables)
    # The README of the archive gives ratings and users, movies.dat has 3,883 lines, and 80 % is 800,167 rows.
    assert (sum(summary.rows.values()), summary.users, summary.items) == (1_000_209, 6_040, 3_883)
    assert summary.rows["train"] == 800_167
    assert summary.positives == summary.rows
    raw = zipfile.ZipFile(SHARED / "ml-1m.zip").read("ml-1m/ratings.dat").decode("latin-1").splitlines()
    times = sorted(int(line.rsplit("::", 1)[1]) for line in raw)
    assert (times[0], times[-1]) == (summary.first_event_unix_s["train"], summary.last_event_unix_s["test"])
    liked = sum(line.split("::")[2] in "45" for line in raw)
    interactions = pl.read_parquet(tables / "interactions.parquet")
    assert interactions["like"].sum() == liked
    items = pl.read_parquet(tables / "items.parquet")
    assert items.filter(pl.col("item_id") == "73")["title"].to_list() == ["Misérables, Les (1995)"]
    assert (items["year"].min(), items["year"].max()) == (1919, 2000)


@pytest.mark.slow
def test_real_kuairand_tables_follow_the_default_split(tmp_path: Path, cache_dir: Path) -> None:
    source = prepare_source("kuairand-pure", needs("KuaiRand-Pure-subset.tar.gz"), cache_dir)
    tables = prepare_tables(load_dataset_spec("kuairand-pure"), source, tmp_path / "tables")
    summary = read_summary(tables)
    assert (summary.users, summary.items) == (27_285, 7_583)
    # By hand: 2022-05-05 00:00 in Shanghai is 1651680000; days are 86,400 s.
    assert summary.first_event_unix_s["train"] >= 1651680000 - 10 * 86_400
    assert summary.last_event_unix_s["train"] < 1651680000 <= summary.first_event_unix_s["eval"]
    assert summary.last_event_unix_s["eval"] < 1651680000 + 86_400 <= summary.first_event_unix_s["test"]
    interactions = pl.read_parquet(tables / "interactions.parquet")
    assert interactions["click"].mean() == pytest.approx(0.442, abs=0.01)
    assert interactions["long_view"].mean() == pytest.approx(0.311, abs=0.01)
    assert interactions["like"].mean() == pytest.approx(0.0172, abs=0.001)
    # A duration of 0 is unknown: it must not cap the watch time to nothing.
    unknown = interactions.filter(pl.col("item_duration_s").is_null())
    assert unknown["watch_time_s"].sum() > 0
    items = pl.read_parquet(tables / "items.parquet")
    assert items["duration_s"].median() == pytest.approx(70, rel=0.5)  # seconds, not milliseconds
