"""Downloads against a local HTTP server that can break in the ways real ones do."""

from __future__ import annotations

import collections
import errno
import fcntl
import hashlib
import http.server
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schema.errors import ConfigError, DataError
from tfx_pipeline.datasets.download import download, file_checksum

# Not a multiple of the chunk size and different at every offset, so that misplaced bytes show.
CONTENT = b"".join(i.to_bytes(4, "big") for i in range(700_001))
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class FileServer(http.server.ThreadingHTTPServer):
    """Serves `content` for any path; the attributes say how it misbehaves."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = CONTENT
        self.honours_range = True
        self.cut_after_bytes: collections.deque[int] = collections.deque()  # one entry per request to cut
        self.statuses: collections.deque[int] = collections.deque()  # one entry per request to refuse
        self.lies_about_range = False
        self.declared_length: int | None = None
        self.requests: list[str | None] = []  # the Range header of every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/archive.zip"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/archive.zip")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        requested = self.headers.get("Range")
        self.server.requests.append(requested)
        if self.server.statuses:
            self.send_error(self.server.statuses.popleft())
            return
        content = self.server.content
        start = 0
        if requested is not None and self.server.honours_range:
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            first = 0 if self.server.lies_about_range else start
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(self.server.declared_length or len(body)))
        self.end_headers()
        if self.server.cut_after_bytes:
            body = body[: self.server.cut_after_bytes.popleft()]
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as file_server:
        thread = threading.Thread(target=file_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield file_server
        file_server.shutdown()
        thread.join()


def fetch(url: str, destination: Path, checksum: str = SHA256) -> Path:
    return download(url, destination, checksum, attempts=3, retry_wait_s=0.0, show_progress=False)


def part_of(destination: Path) -> Path:
    return destination.with_name(destination.name + ".part")


def test_file_arrives_whole_in_a_new_folder(server: FileServer, tmp_path: Path) -> None:
    destination = tmp_path / "new" / "archive.zip"
    assert fetch(server.url, destination) == destination
    assert destination.read_bytes() == CONTENT
    assert os.listdir(destination.parent) == ["archive.zip"]


def test_md5_is_accepted_and_checked(server: FileServer, tmp_path: Path) -> None:
    fetch(server.url, tmp_path / "a", "md5:" + hashlib.md5(CONTENT).hexdigest().upper())
    with pytest.raises(DataError, match="expected md5 0cc175b9"):
        fetch(server.url, tmp_path / "b", "md5:0cc175b9c0f1b6a831c399e269772661")


def test_redirect_is_followed(server: FileServer, tmp_path: Path) -> None:
    fetch(server.url.replace("archive.zip", "moved"), tmp_path / "archive.zip")
    assert (tmp_path / "archive.zip").read_bytes() == CONTENT


def test_verified_file_is_not_fetched_again(server: FileServer, tmp_path: Path) -> None:
    fetch(server.url, tmp_path / "archive.zip")
    fetch(server.url, tmp_path / "archive.zip")
    assert len(server.requests) == 1


def test_present_file_with_other_content_is_replaced(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"an older release")
    fetch(server.url, tmp_path / "archive.zip")
    assert (tmp_path / "archive.zip").read_bytes() == CONTENT


def test_cut_connection_is_resumed_where_it_broke(server: FileServer, tmp_path: Path) -> None:
    server.cut_after_bytes.extend([1_500_000, 1_000_000])
    fetch(server.url, tmp_path / "archive.zip")
    assert (tmp_path / "archive.zip").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1500000-", "bytes=2500000-"]


def test_interrupted_download_is_resumed_by_the_next_call(server: FileServer, tmp_path: Path) -> None:
    destination = tmp_path / "archive.zip"
    server.cut_after_bytes.extend([100_000, 0, 0])
    with pytest.raises(DataError, match=r"100,000 bytes received.*run the same command again to resume"):
        fetch(server.url, destination)
    assert part_of(destination).stat().st_size == 100_000
    assert not destination.exists()

    fetch(server.url, destination)
    assert destination.read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=100000-"


def test_whole_file_is_taken_when_the_server_ignores_range(server: FileServer, tmp_path: Path) -> None:
    server.honours_range = False
    server.cut_after_bytes.append(1_500_000)
    fetch(server.url, tmp_path / "archive.zip")
    assert (tmp_path / "archive.zip").read_bytes() == CONTENT


def test_partial_file_of_another_release_is_thrown_away(server: FileServer, tmp_path: Path) -> None:
    destination = tmp_path / "archive.zip"
    part_of(destination).write_bytes(b"x" * 1_000)
    fetch(server.url, destination)
    assert destination.read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-", None]


@pytest.mark.parametrize("surplus", [b"", b"beyond the end"], ids=["complete", "too long"])
def test_partial_file_with_nothing_left_to_fetch(server: FileServer, tmp_path: Path, surplus: bytes) -> None:
    destination = tmp_path / "archive.zip"
    part_of(destination).write_bytes(CONTENT + surplus)
    fetch(server.url, destination)
    assert destination.read_bytes() == CONTENT


def test_answer_from_another_offset_is_refused(server: FileServer, tmp_path: Path) -> None:
    part_of(tmp_path / "archive.zip").write_bytes(CONTENT[:1_000])
    server.lies_about_range = True
    with pytest.raises(DataError, match="asked for bytes from 1000"):
        fetch(server.url, tmp_path / "archive.zip")


def test_wrong_bytes_name_both_checksums_and_leave_nothing(server: FileServer, tmp_path: Path) -> None:
    server.content = b"<html>Please log in to the hotel network</html>"
    with pytest.raises(DataError) as error:
        fetch(server.url, tmp_path / "archive.zip")
    assert SHA256.removeprefix("sha256:") in str(error.value)
    assert hashlib.sha256(server.content).hexdigest() in str(error.value)
    assert "--data-dir" in str(error.value)
    assert os.listdir(tmp_path) == []


def test_missing_file_is_reported_at_once_with_a_way_out(server: FileServer, tmp_path: Path) -> None:
    server.statuses.append(404)
    with pytest.raises(DataError, match=r"404 Not Found.*--data-dir"):
        fetch(server.url, tmp_path / "archive.zip")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_busy_server_is_asked_again(server: FileServer, tmp_path: Path, status: int) -> None:
    server.statuses.extend([status, status])
    fetch(server.url, tmp_path / "archive.zip")
    assert (tmp_path / "archive.zip").read_bytes() == CONTENT


def test_server_that_stays_busy_is_given_up(server: FileServer, tmp_path: Path) -> None:
    server.statuses.extend([503, 503, 503])
    with pytest.raises(DataError, match="gave up after 3 tries"):
        fetch(server.url, tmp_path / "archive.zip")


def test_no_network_says_what_to_check(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/archive.zip"
        with pytest.raises(DataError, match=r"cannot reach .*HTTPS_PROXY.*--data-dir"):
            fetch(url, tmp_path / "archive.zip")


def test_too_little_space_is_noticed_before_anything_is_written(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    with pytest.raises(DataError, match=r"needs 2,800,004 more bytes.*1,000 free"):
        fetch(server.url, tmp_path / "archive.zip")
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up_keeps_what_has_arrived(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "archive.zip"
    part_of(destination).write_bytes(CONTENT[:1_000])

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode or "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return original(self, mode, *args, **kwargs)

    original = Path.open
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DataError, match=r"No space left on device.*free space"):
        fetch(server.url, destination)
    assert part_of(destination).read_bytes() == CONTENT[:1_000]


def test_second_process_in_the_same_folder_is_refused(server: FileServer, tmp_path: Path) -> None:
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(DataError, match="another process"):
            fetch(server.url, tmp_path / "archive.zip")
    finally:
        os.close(holder)
    fetch(server.url, tmp_path / "archive.zip")


@pytest.mark.parametrize("checksum", ["", "0cc175b9c0f1b6a831c399e269772661", "crc:00", "md5:"])
def test_checksum_without_algorithm_is_a_configuration_error(tmp_path: Path, checksum: str) -> None:
    with pytest.raises(ConfigError, match="<algorithm>:<hex>"):
        fetch("http://127.0.0.1:9/a", tmp_path / "a", checksum)


def test_progress_bar_goes_to_standard_error(
    server: FileServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    download(server.url, tmp_path / "archive.zip", SHA256)
    out, err = capfd.readouterr()
    assert out == ""
    assert "archive.zip" in err
    assert "2.8" in err  # MB of CONTENT


def test_file_checksum_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # RFC 1321, appendix A.5
    assert file_checksum(tmp_path / "a", "md5") == "900150983cd24fb0d6963f7d28e17f72"
