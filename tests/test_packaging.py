"""setup.py, the lock, the bootstrap script and the documents agree with each other."""

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPO = Path(__file__).parent.parent
PACKAGES = ("schema", "trainer", "serving", "tfx_pipeline")
# Extras that are built from source: a fresh machine may have no compiler.
UNLOCKED = {"index-benchmark"}


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, Any]:
    """What setup.py passes to setup()."""
    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        patch.setattr(setuptools, "setup", arguments.update)
        runpy.run_path("setup.py")
    return arguments


@pytest.fixture(scope="module")
def direct_requirements(setup_arguments: dict[str, Any]) -> list[Requirement]:
    texts = [
        *setup_arguments["install_requires"],
        *itertools.chain(*(v for k, v in setup_arguments["extras_require"].items() if k not in UNLOCKED)),
    ]
    return [Requirement(text) for text in texts]


@pytest.fixture(scope="module")
def lock() -> dict[str, tuple[Version, int]]:
    """Locked version and number of hashes by package."""
    locked = {}
    name = ""
    for line in (REPO / "requirements.lock").read_text().splitlines():
        if match := re.match(r"([a-z0-9-]+)==(\S+) \\$", line):
            name = match[1]
            locked[name] = (Version(match[2]), 0)
        elif re.match(r"    --hash=sha256:[0-9a-f]{64}( \\)?$", line):
            version, count = locked[name]
            locked[name] = (version, count + 1)
        else:
            assert re.match(r" *#", line), f"neither a pin, a hash nor a comment: {line}"
    return locked


def test_lock_holds_every_direct_dependency_at_an_allowed_version(
    direct_requirements: list[Requirement], lock: dict[str, tuple[Version, int]]
) -> None:
    assert len(direct_requirements) > 20
    for requirement in direct_requirements:
        version, _ = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but locked {version}: run make lock"


def test_every_locked_package_has_hashes(lock: dict[str, tuple[Version, int]]) -> None:
    assert [name for name, (_, hashes) in lock.items() if hashes == 0] == []


def test_lock_names_no_host_and_no_path() -> None:
    text = (REPO / "requirements.lock").read_text()
    assert re.findall(r"https?:|file:|--(?:extra-)?index-url|--find-links|(?<!\w)/\w+/| @ ", text) == []


def test_the_set_that_works_together_is_pinned_exactly(direct_requirements: list[Requirement]) -> None:
    exact = {r.name: str(r.specifier) for r in direct_requirements if str(r.specifier).startswith("==")}
    # ScaNN's ops load only into the TensorFlow minor version that they were built for: 1.3.2 goes with 2.16.
    assert exact["tensorflow"].startswith("==2.16.")
    assert exact["scann"] == "==1.3.2"
    assert {"tfx", "tf-keras", "tensorflow-recommenders", "tensorflow-serving-api", "apache-beam"} <= set(
        exact
    )


def test_compatibility_table_states_the_pinned_versions(direct_requirements: list[Requirement]) -> None:
    table = (REPO / "docs" / "compatibility.md").read_text()
    for requirement in direct_requirements:
        if requirement.name in (
            "tfx",
            "tensorflow",
            "tf-keras",
            "scann",
            "tensorflow-recommenders",
            "apache-beam",
        ):
            assert str(requirement.specifier).removeprefix("==") in table, requirement.name


def test_changelog_speaks_of_this_version(setup_arguments: dict[str, Any]) -> None:
    changelog = (REPO / "CHANGELOG.md").read_text()
    assert re.search(
        rf"^## \[({re.escape(setup_arguments['version'])}|Unreleased)\]", changelog, re.MULTILINE
    )


def test_built_package_holds_every_data_file(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(REPO / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "setup.py", tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    def data_files(root: Path) -> set[str]:
        suffixes = {".py", ".yaml", ".html", ".j2", ".config", ".pbtxt"}
        return {
            str(path.relative_to(root))
            for package in PACKAGES
            for path in (root / package).rglob("*")
            if path.suffix in suffixes
        }

    assert data_files(tmp_path / "built") == data_files(REPO)


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    commands = [
        line for line in (REPO / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert commands == [
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."',
        "scripts/chromium.sh",
        "make test",
    ]
    assert os.access(REPO / ".ci" / "run", os.X_OK)
    workflow = (REPO / ".github" / "workflows" / "ci.yml").read_text()
    assert set(re.findall(r"- run: (.*)", workflow)) == {"make test", "make run"}
    readme = (REPO / "README.md").read_text()
    assert re.search(r"\bmake test\b", readme)
    assert re.search(r"\bmake run\b", readme)


def test_a_browser_that_cannot_be_installed_is_told_and_fails_nothing(tmp_path: Path) -> None:
    for name, script in (("apt-get", "echo no network; exit 100"), ("id", "echo 0")):
        write_command(tmp_path / name, script)
    for name in ("bash", "mktemp", "rm", "tail"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [REPO / "scripts" / "chromium.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "no network" in done.stderr
    assert "CHROMIUM COULD NOT BE INSTALLED: the browser tests will be skipped" in done.stderr


# --- scripts/bootstrap.sh: which Python is found ---


def write_command(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def working_python(path: Path) -> Path:
    """A command that behaves as the Python 3.10 that runs this test."""
    base = Path(sys.base_prefix) / "bin" / "python3.10"
    return write_command(path, f'exec {base} "$@"')


def broken_shim(path: Path) -> Path:
    """What pyenv leaves on PATH for a version that is installed but not selected."""
    return write_command(path, "echo 'pyenv: python3.10: command not found' >&2; exit 127")


@pytest.fixture
def find_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the finder with only `tmp_path/bin` and the shell's own tools on PATH, and with an empty home."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("awk", "bash", "cat", "dirname", "sort"):
        located = shutil.which(tool)
        assert located is not None
        (tools / tool).symlink_to(located)

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        base = {"PATH": f"{tmp_path / 'bin'}:{tools}", "HOME": str(tmp_path / "home")}
        command = ["bash", str(REPO / "scripts" / "bootstrap.sh"), "--find-python"]
        return subprocess.run(command, env=base | environment, capture_output=True, text=True)

    return run


def test_a_python_on_path_that_runs_is_taken(
    tmp_path: Path, find_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    expected = working_python(tmp_path / "bin" / "python3.10")
    working_python(tmp_path / "pyenv" / "versions" / "3.10.9" / "bin" / "python")
    assert find_python(PYENV_ROOT=str(tmp_path / "pyenv")).stdout == f"{expected}\n"


def test_a_broken_shim_is_passed_over_for_the_newest_pyenv_version(
    tmp_path: Path, find_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    broken_shim(tmp_path / "bin" / "python3.10")
    versions = tmp_path / "pyenv" / "versions"
    working_python(versions / "3.10.9" / "bin" / "python")
    newest = working_python(versions / "3.10.13" / "bin" / "python")
    write_command(versions / "3.11.7" / "bin" / "python", "exit 1")
    assert find_python(PYENV_ROOT=str(tmp_path / "pyenv")).stdout == f"{newest}\n"


def test_pyenv_is_found_in_its_usual_place_without_any_setting(
    tmp_path: Path, find_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    expected = working_python(tmp_path / "home" / ".pyenv" / "versions" / "3.10.4" / "bin" / "python")
    assert find_python().stdout == f"{expected}\n"


def test_uv_is_asked_last(
    tmp_path: Path, find_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    broken_shim(tmp_path / "bin" / "python3.10")
    expected = working_python(tmp_path / "uv" / "python")
    write_command(tmp_path / "bin" / "uv", f'[ "$*" = "python find 3.10" ] && echo {expected}')
    assert find_python().stdout == f"{expected}\n"


def test_when_none_is_found_the_message_lists_what_was_tried_and_three_fixes(
    tmp_path: Path, find_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    shim = broken_shim(tmp_path / "bin" / "python3.10")
    other = write_command(tmp_path / "pyenv" / "versions" / "3.10.2" / "bin" / "python", "echo is Python 3.9")
    result = find_python(PYENV_ROOT=str(tmp_path / "pyenv"))
    assert (result.returncode, result.stdout) == (1, "")
    for part in (
        f"{shim} does not run",
        f"{other} is Python 3.9",
        "pyenv install 3.10",
        "uv python install 3.10",
        "FUNNEL_PYTHON=",
    ):
        assert part in result.stderr


def test_when_nothing_is_there_the_message_says_so(
    find_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = find_python()
    assert result.returncode == 1
    assert "python3.10 is not on PATH, pyenv has no 3.10, uv has no 3.10" in result.stderr


def test_an_explicit_python_that_does_not_fit_is_an_error_not_a_reason_to_search(
    tmp_path: Path, find_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    working_python(tmp_path / "bin" / "python3.10")
    absent = tmp_path / "absent"
    result = find_python(FUNNEL_PYTHON=str(absent))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"FUNNEL_PYTHON={absent} does not run" in result.stderr

    chosen = working_python(tmp_path / "elsewhere" / "python")
    assert find_python(FUNNEL_PYTHON=str(chosen)).stdout == f"{chosen}\n"
