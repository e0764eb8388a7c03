"""The doctor tells what is wrong and how to fix it, without importing TensorFlow."""

import importlib.metadata
import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tfx_pipeline import doctor

HASWELL = {"fpu", "avx", "fma", "avx2"}


@pytest.fixture
def listening_port() -> Iterator[int]:
    """A port on which this process listens, on all addresses as a model server does."""
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], dict[str, str]], None]:
    """Replaces what the distribution declares and what is installed."""

    def apply(requirements: list[str], installed: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
        monkeypatch.setattr(importlib.metadata, "version", version)

    return apply


def statuses(checks: list[doctor.Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "ok"), ((3, 9), "fail"), ((3, 11), "fail"), ((2, 7), "fail")]
)
def test_only_python_3_10_is_accepted(version: tuple[int, int], status: str) -> None:
    check = doctor.check_interpreter(version)
    assert check.status == status
    assert ("pyenv install 3.10" in check.fix) == (status == "fail")


@pytest.mark.parametrize(
    ("libc", "status"),
    [
        (("glibc", "2.28"), "ok"),
        (("glibc", "2.39"), "ok"),
        (("glibc", "2.27"), "fail"),
        # Compared as text, 2.9 would be above 2.28.
        (("glibc", "2.9"), "fail"),
        # What Python reports under musl.
        (("", ""), "fail"),
    ],
)
def test_glibc_has_a_floor_and_no_ceiling(libc: tuple[str, str], status: str) -> None:
    assert doctor.check_glibc(libc).status == status


def test_cpu_without_avx_fails_and_without_avx2_is_only_slow() -> None:
    assert doctor.check_cpu(HASWELL).status == "ok"
    assert doctor.check_cpu(HASWELL - {"avx2"}).status == "warn"
    for flag in ("avx", "fma"):
        check = doctor.check_cpu(HASWELL - {flag})
        assert check.status == "fail"
        assert "-cpu host" in check.fix


def test_cpu_flags_are_read_from_the_first_core(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx\n\nprocessor\t: 1\nflags\t\t: fpu avx fma\n")
    assert doctor.read_cpu_flags(cpuinfo) == {"fpu", "avx"}
    assert doctor.read_cpu_flags(tmp_path / "absent") == set()


def test_a_moved_package_of_the_tested_set_fails_by_name(
    declare: Callable[[list[str], dict[str, str]], None],
) -> None:
    declare(
        [
            "scann==1.3.2",
            "apache-beam[gcp]==2.65.0",
            "tf-keras==2.16.0",
            "rich<16,>=15.0",
            'kfp==2.5.0; extra == "x"',
        ],
        {"scann": "1.3.3", "apache-beam": "2.65.0", "rich": "15.2"},
    )
    checks = doctor.check_packages()
    assert statuses(checks) == {
        "scann": "fail",
        "apache-beam": "ok",
        "tf-keras": "fail",
        "other packages": "ok",
    }
    scann = checks[0]
    assert (scann.found, scann.expected) == ("1.3.3", "1.3.2")
    assert "make env" in scann.fix


def test_a_library_outside_its_range_is_named(declare: Callable[[list[str], dict[str, str]], None]) -> None:
    declare(["rich<16,>=15.0", "httpx<0.29,>=0.28", "numpy"], {"rich": "14.0", "numpy": "1.26.4"})
    (check,) = doctor.check_packages()
    assert check.status == "fail"
    assert "rich<16,>=15.0 (found: 14.0)" in check.found
    assert "httpx<0.29,>=0.28 (found: not installed)" in check.found
    assert "numpy" not in check.found


def test_a_project_that_is_not_installed_is_reported() -> None:
    (check,) = doctor.check_packages("funnel-recommender-that-nobody-installed")
    assert check.status == "fail"
    assert check.fix == "make env"


@pytest.mark.parametrize(
    ("probe", "keras", "scann"),
    [
        pytest.param(
            'print(\'{"keras": "2.16.0", "keras_s": 4.2}\'); raise SystemExit(\'undefined symbol\')',
            ("ok", "2.16.0, loaded in 4.2 s"),
            ("fail", "undefined symbol"),
            id="ops do not load",
        ),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            ("fail", "killed by SIGILL"),
            ("fail", "not reached: TensorFlow did not load"),
            id="TensorFlow crashes",
        ),
        pytest.param(
            'print(\'{"keras": "3.12.4", "keras_s": 1, "neighbour": 3, "scann_s": 2}\')',
            ("fail", "3.12.4, loaded in 1.0 s"),
            ("ok", "found row 3, loaded in 2.0 s"),
            id="Keras 3 in use",
        ),
        pytest.param(
            'print(\'{"keras": "2.16.0", "keras_s": 1, "neighbour": 0, "scann_s": 2}\')',
            ("ok", "2.16.0, loaded in 1.0 s"),
            ("fail", "found row 0, loaded in 2.0 s"),
            id="ScaNN answers wrongly",
        ),
        pytest.param(
            'import time; print(\'{"keras": "2.16.0", "keras_s": 1}\', flush=True); time.sleep(60)',
            ("ok", "2.16.0, loaded in 1.0 s"),
            ("fail", "no answer within 5 s"),
            id="ScaNN hangs",
        ),
    ],
)
def test_each_way_of_not_loading_is_told(probe: str, keras: tuple[str, str], scann: tuple[str, str]) -> None:
    checks = doctor.check_libraries(probe, timeout_s=5)
    assert [(check.status, check.found) for check in checks] == [keras, scann]
    assert all((check.status == "ok") == (check.fix == "") for check in checks)


@pytest.mark.slow
def test_the_installed_libraries_load(monkeypatch: pytest.MonkeyPatch) -> None:
    # The user's own setting does not matter: Funnel sets its own before TensorFlow starts.
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "0")
    assert [check.status for check in doctor.check_libraries()] == ["ok", "ok"]


def test_a_taken_port_names_its_holder_and_a_freed_one_is_free(listening_port: int) -> None:
    check = doctor.check_port(listening_port)
    assert check.status == "warn"
    assert f"pid {os.getpid()}" in check.found
    assert f"pid {os.getpid()}" in check.fix

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert doctor.check_port(free).status == "ok"


def test_output_dir_is_judged_by_its_nearest_existing_folder(tmp_path: Path) -> None:
    check = doctor.check_output_dir(tmp_path / "not" / "yet", minimum_gib=0)
    assert check.status == "ok"
    assert str(tmp_path) in check.found
    assert not (tmp_path / "not").exists()

    full = doctor.check_output_dir(tmp_path, minimum_gib=1e6)
    assert full.status == "fail"
    assert "--output-dir" in full.fix


def test_output_dir_below_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = doctor.check_output_dir(tmp_path / "file" / "run")
    assert check.status == "fail"
    assert "not a writable folder" in check.found


def test_memory_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert doctor.available_memory_bytes(tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.available_memory_bytes(tmp_path) > 5000


def test_little_memory_is_a_warning() -> None:
    assert doctor.check_memory(16 * 2**30).status == "ok"
    assert doctor.check_memory(2**30).status == "warn"


def test_table_shows_every_check_and_its_fix() -> None:
    checks = [
        doctor.Check("glibc", "ok", "glibc 2.36", ">= 2.28"),
        doctor.Check("apache-beam[gcp]", "fail", "[1, 2]", "2.65.0", "make env"),
    ]
    output = io.StringIO()
    Console(file=output, width=120).print(doctor.render(checks))
    lines = output.getvalue().splitlines()
    assert [line for line in lines if re.match(r"glibc +ok +glibc 2\.36 +>= 2\.28", line)]
    # Square brackets are text, not markup.
    assert [line for line in lines if re.match(r"apache-beam\[gcp\] +fail +\[1, 2\] +2\.65\.0", line)]
    assert [line for line in lines if "fix: make env" in line]


def test_doctor_does_not_import_tensorflow() -> None:
    code = "import sys, tfx_pipeline.doctor; print({'tensorflow', 'tfx', 'scann'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "set()"
