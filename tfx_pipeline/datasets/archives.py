"""The official archives: where they come from, what is taken out of them, and how a local copy is found."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import logging
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from schema.errors import ConfigError, DataError
from tfx_pipeline.datasets.download import download, file_checksum
from tfx_pipeline.datasets.movielens import MOVIES, RATINGS, USERS, convert_movielens

logger = logging.getLogger(__name__)

# Part of the name of every prepared folder: raise it when the prepared files change for the same archive.
_PREPARED_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Archive:
    """One official archive.

    Attributes:
      url: its official home; the last part is the file name.
      checksum: `<algorithm>:<hex>` as published there.
      size_bytes: of the archive.
      folder: the top folder inside the archive.
      members: files that are needed, relative to `folder`.
      unofficial_names: other file names taken from --data-dir, checked by their members only.
      convert: (members' folder, target folder) makes the source files that the dataset YAML names; None where
        the members are those files.
    """

    url: str
    checksum: str
    size_bytes: int
    folder: str
    members: tuple[str, ...]
    unofficial_names: tuple[str, ...] = ()
    convert: Callable[[Path, Path], None] | None = None

    @property
    def file_name(self) -> str:
        """The official file name."""
        return PurePosixPath(self.url).name


ARCHIVES = {
    "kuairand-pure": Archive(
        url="https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz",
        checksum="md5:0820331067a3784d9691136f772b35a7",
        size_bytes=47_432_272,
        folder="KuaiRand-Pure",
        members=(
            "data/log_standard_4_22_to_5_08_pure.csv",
            "data/user_features_pure.csv",
            "data/video_features_basic_pure.csv",
        ),
        unofficial_names=("KuaiRand-Pure-subset.tar.gz",),
    ),
    "movielens-1m": Archive(
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        checksum="sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        size_bytes=5_917_549,
        folder="ml-1m",
        members=(RATINGS, USERS, MOVIES),
        convert=convert_movielens,
    ),
}


def prepare_source(name: str, data_dir: Path | None, cache_dir: Path) -> Path:
    """Finds or downloads an official dataset and returns the folder that its YAML's `files` are relative to.

    An archive is unpacked, and MovieLens converted to Parquet, under `cache_dir`, in a folder named after the
    content: a second call finds it, another archive gets another folder. `data_dir` is only read.

    Args:
      name: a key of `ARCHIVES`.
      data_dir: None downloads; else the archive file, a folder that holds it, or a folder with the
        extracted layout, with or without the archive's top folder.
      cache_dir: kept between runs.

    Raises:
      ConfigError: `name` is not an official dataset.
      DataError: the download fails; `data_dir` has none of the above; the archive is damaged, incomplete, or
        bears the official name with other content; the cache cannot be written.
    """
    archive = ARCHIVES.get(name)
    if archive is None:
        raise ConfigError(
            f"{name!r} is not an official dataset; official ones: {', '.join(sorted(ARCHIVES))}"
        )
    cache = cache_dir / name
    if data_dir is None:
        path = download(archive.url, cache_dir / "downloads" / archive.file_name, archive.checksum)
        return _from_archive(archive, path, cache)
    if data_dir.is_file():
        return _from_archive(archive, data_dir, cache)
    for root in (data_dir / archive.folder, data_dir):
        if all((root / member).is_file() for member in archive.members):
            return _from_folder(archive, root, cache)
    for file_name in (archive.file_name, *archive.unofficial_names):
        if (data_dir / file_name).is_file():
            return _from_archive(archive, data_dir / file_name, cache)
    raise DataError(_nothing_usable(name, archive, data_dir))


def _from_folder(archive: Archive, root: Path, cache: Path) -> Path:
    convert = archive.convert
    if convert is None:
        return root
    key = _fingerprint([root / member for member in archive.members])
    return _build(cache / key, lambda folder: convert(root, folder))


def _from_archive(archive: Archive, path: Path, cache: Path) -> Path:
    if path.name == archive.file_name:
        algorithm, _, expected = archive.checksum.partition(":")
        actual = file_checksum(path, algorithm)
        if actual != expected:
            raise DataError(
                f"{path}: expected {algorithm} {expected}, got {actual} ({path.stat().st_size:,} bytes, the "
                f"official archive has {archive.size_bytes:,}); fetch it again from {archive.url}, or "
                "give another version of the dataset another file name and pass that file as --data-dir"
            )
    else:
        logger.warning("not the official archive, checked by its files only path=%s", path)

    def fill(folder: Path) -> None:
        if archive.convert is None:
            _extract(archive, path, folder)
            return
        with tempfile.TemporaryDirectory(dir=folder.parent) as raw:
            _extract(archive, path, Path(raw))
            archive.convert(Path(raw), folder)

    return _build(cache / _fingerprint([path]), fill)


def _fingerprint(paths: Sequence[Path]) -> str:
    digests = "".join(file_checksum(path, "sha256") for path in paths)
    return f"v{_PREPARED_VERSION}-{hashlib.sha256(digests.encode()).hexdigest()[:16]}"


def _build(final: Path, fill: Callable[[Path], None]) -> Path:
    """Returns `final`, filled. It appears by a rename, so that a folder of this name is always complete."""
    if final.is_dir():
        logger.info("already prepared path=%s", final)
        return final
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        fill(partial)
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was faster, with the same content
                raise
        return final
    except OSError as error:
        raise DataError(f"cannot write {final}: {error}; free space or fix permissions, run again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _extract(archive: Archive, path: Path, folder: Path) -> None:
    """Copies the needed members only, to paths made here: no name in the archive becomes a path."""
    wanted = {f"{archive.folder}/{member}": folder / member for member in archive.members}
    found = []
    try:
        for name, stream in _regular_files(path):
            found.append(name)
            target = wanted.pop(name, None)
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
            if not wanted:
                return
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is damaged or not a .tar.gz or .zip: {error}; fetch it from {archive.url}"
        ) from error
    raise DataError(
        f"{path}: no regular file {', '.join(sorted(wanted))} inside; found: {_listing(found)}; "
        f"the official archive is {archive.url}"
    )


def _regular_files(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of every regular file of a zip or a tar of any compression, in archive order."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zip_file:
            for info in zip_file.infolist():
                if not info.is_dir():
                    with zip_file.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(path) as tar_file:
        for member in tar_file:
            stream_or_none = tar_file.extractfile(member) if member.isreg() else None
            if stream_or_none is not None:
                with stream_or_none as stream:
                    yield member.name.removeprefix("./"), stream


def _nothing_usable(name: str, archive: Archive, data_dir: Path) -> str:
    if not data_dir.exists():
        return f"--data-dir {data_dir} does not exist; leave it out to download {name} from {archive.url}"
    found = sorted(str(path.relative_to(data_dir)) for path in data_dir.glob("*"))
    missing = [
        m
        for m in archive.members
        if not any((r / m).is_file() for r in (data_dir, data_dir / archive.folder))
    ]
    return (
        f"{name}: {data_dir} holds neither {archive.file_name} nor its extracted files; missing: "
        f"{', '.join(missing)} (in {archive.folder}/ or at the top); found: {_listing(found)}. "
        f"Point --data-dir at the archive or its folder, or leave it out to download from {archive.url}"
    )


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) or "nothing"
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
