"""Downloads one file over HTTP: resumed when cut, verified by checksum, renamed only when complete."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from schema.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0


def download(
    url: str,
    destination: Path,
    checksum: str,
    *,
    attempts: int = 4,
    retry_wait_s: float = 1.0,
    show_progress: bool = True,
) -> Path:
    """Fetches `url` into `destination`; returns at once when the verified file is already there.

    Bytes arrive in `<destination>.part`, which an interrupted call leaves behind and the next call resumes.
    The checksum decides whether resumed bytes belong together: when they do not, the file is fetched once
    more in full.

    Args:
      url: http or https address; redirects are followed.
      destination: file to write; its folder is made.
      checksum: `<algorithm>:<hex>` to expect, such as `md5:0cc175b9c0f1b6a831c399e269772661`.
      attempts: tries per file when the connection breaks or the server answers 429 or 5xx; at least 1.
      retry_wait_s: wait before the second try; doubles with every further one.
      show_progress: draws a progress bar on standard error.

    Returns:
      `destination`.

    Raises:
      DataError: no network, an HTTP error, a connection that keeps breaking, wrong checksum, disk full, or
        another process that downloads into the same folder.
      ConfigError: `checksum` is not of the form above.
    """
    algorithm, expected = _parse_checksum(checksum)
    part = destination.with_name(destination.name + ".part")
    by_hand = f"or fetch {url} by hand and pass its folder as --data-dir"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _only_process_in(destination.parent):
            if destination.exists():
                if file_checksum(destination, algorithm) == expected:
                    logger.info("already downloaded path=%s", destination)
                    return destination
                logger.warning("wrong checksum, fetching again path=%s", destination)
            is_resumed = part.exists()
            _fetch(url, part, by_hand, attempts, retry_wait_s, show_progress)
            actual = file_checksum(part, algorithm)
            if actual != expected and is_resumed:
                logger.warning("resumed bytes have the wrong checksum, fetching from the start url=%s", url)
                part.unlink()
                _fetch(url, part, by_hand, attempts, retry_wait_s, show_progress)
                actual = file_checksum(part, algorithm)
            if actual != expected:
                size_bytes = part.stat().st_size
                part.unlink()
                raise DataError(
                    f"{url}: expected {algorithm} {expected}, got {actual} ({size_bytes:,} bytes); "
                    f"the partial file was removed. A proxy may have altered the answer: try again, {by_hand}"
                )
            os.replace(part, destination)
            return destination
    except OSError as error:
        raise DataError(
            f"cannot write {destination}: {error}; free space or fix the permissions and run the same "
            "command again, what has arrived is kept"
        ) from error


def file_checksum(path: Path, algorithm: str) -> str:
    """Hex digest of a file's bytes; `algorithm` is a name that hashlib knows."""
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _parse_checksum(checksum: str) -> tuple[str, str]:
    algorithm, _, expected = checksum.partition(":")
    if algorithm not in hashlib.algorithms_guaranteed or not expected:
        raise ConfigError(f"checksum {checksum!r} is not '<algorithm>:<hex>', for instance 'sha256:9f86...'")
    return algorithm, expected.lower()


@contextlib.contextmanager
def _only_process_in(folder: Path) -> Iterator[None]:
    """Holds a lock on `folder`, so that two processes never append to one partial file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process downloads into {folder}; wait for it and run again") from error
        yield
    finally:
        os.close(descriptor)  # releases the lock


def _fetch(
    url: str, part: Path, by_hand: str, attempts: int, retry_wait_s: float, show_progress: bool
) -> None:
    """Brings `part` to its full length, resuming after every break."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with (
        httpx.Client(follow_redirects=True, timeout=_TIMEOUT_S) as client,
        Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress,
    ):
        bar = progress.add_task(part.name.removesuffix(".part"), total=None)
        for attempt in range(1, attempts + 1):
            try:
                for received_bytes, total_bytes in _stream(client, url, part):
                    progress.update(bar, completed=received_bytes, total=total_bytes)
                return
            except httpx.ConnectError as error:
                raise DataError(
                    f"cannot reach {url}: {error}; check the network and the HTTPS_PROXY variable and run "
                    f"again, {by_hand}"
                ) from error
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status != httpx.codes.TOO_MANY_REQUESTS and status < httpx.codes.INTERNAL_SERVER_ERROR:
                    raise DataError(
                        f"{url}: the server answered {status} {error.response.reason_phrase}; the file may "
                        f"have moved: look for it on the dataset's home page (docs/datasets.md), {by_hand}"
                    ) from error
                reason: httpx.HTTPError = error
            except httpx.TransportError as error:
                reason = error
            if attempt == attempts:
                size_bytes = part.stat().st_size if part.exists() else 0
                raise DataError(
                    f"{url}: gave up after {attempts} tries with {size_bytes:,} bytes received: {reason}; "
                    f"run the same command again to resume, {by_hand}"
                ) from reason
            logger.warning("download broke, trying again attempt=%d/%d reason=%s", attempt, attempts, reason)
            time.sleep(retry_wait_s * 2 ** (attempt - 1))


def _stream(client: httpx.Client, url: str, part: Path) -> Iterator[tuple[int, int | None]]:
    """Makes one request, appends what arrives to `part`, yields (bytes on disk, bytes in all or None)."""
    offset = part.stat().st_size if part.exists() else 0
    # Without "identity" a server may compress the body on the fly, and byte ranges of that mean nothing.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with client.stream("GET", url, headers=headers) as response:
        if offset and response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing lies beyond what is on disk; the checksum judges it
        response.raise_for_status()
        if response.status_code == httpx.codes.PARTIAL_CONTENT:
            content_range = response.headers.get("Content-Range", "")
            if not content_range.startswith(f"bytes {offset}-"):
                raise DataError(
                    f"{url}: asked for bytes from {offset}, the server sent {content_range!r}; delete {part}"
                )
        else:
            offset = 0  # the server ignores Range and sends the whole file
        length = response.headers.get("Content-Length")
        total_bytes = offset + int(length) if length else None
        free_bytes = shutil.disk_usage(part.parent).free
        if length and int(length) > free_bytes:
            raise DataError(
                f"{url} needs {int(length):,} more bytes, {part.parent} has {free_bytes:,} free; "
                "free space and run again"
            )
        with part.open("ab" if offset else "wb") as file:
            received_bytes = offset
            # No chunk size: httpx would drop the unfinished chunk when the connection breaks.
            for chunk in response.iter_raw():
                file.write(chunk)
                received_bytes += len(chunk)
                yield received_bytes, total_bytes
