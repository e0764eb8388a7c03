"""Checks of the machine and the installed set, each with the exact fix.

TensorFlow is never imported into this process: the doctor has to work where TensorFlow is broken or crashes.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version
from rich.table import Table
from rich.text import Text

DISTRIBUTION = "funnel-recommender"
REBUILD = "rebuild the environment: rm -rf .venv && make env"

# The highest floor among the locked packages that exist as wheels only for newer glibc: h5py, manylinux_2_28.
MINIMUM_GLIBC = "2.28"
# TensorFlow's wheel is compiled for AVX, ScaNN's for AVX and FMA; ScaNN picks its AVX2 kernels at run time.
REQUIRED_CPU_FLAGS = ("avx", "fma")
FAST_CPU_FLAG = "avx2"
MINIMUM_FREE_DISK_GIB = 5.0
MINIMUM_MEMORY_GIB = 4.0
LIBRARY_TIMEOUT_S = 180.0

# Runs in a fresh process and prints one JSON object per stage, so that a crash tells how far it came.
LIBRARY_PROBE = """
import json, sys, time
start = time.monotonic()
import tensorflow as tf
keras = sys.modules[tf.keras.Model.__module__.partition(".")[0]]
print(json.dumps({"keras": keras.__version__, "keras_s": time.monotonic() - start}), flush=True)
start = time.monotonic()
import numpy as np
from scann.scann_ops.py import scann_ops
points = np.eye(16, 8, dtype=np.float32)
neighbours, _ = scann_ops.builder(points, 1, "dot_product").score_brute_force().build().search(points[3])
print(json.dumps({"neighbour": int(neighbours[0]), "scann_s": time.monotonic() - start}), flush=True)
"""

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
      name: what was looked at.
      status: `fail` means that Funnel cannot work, `warn` that a part of it may not, or slowly.
      found: what is there.
      expected: what has to be there.
      fix: what to do next; empty when the status is `ok`.
    """

    name: str
    status: Status
    found: str
    expected: str
    fix: str = ""


def judge(name: str, good: bool, found: str, expected: str, fix: str, otherwise: Status = "fail") -> Check:
    """Makes a Check: `ok` without a fix when `good`, else `otherwise` with the fix."""
    return Check(name, "ok", found, expected) if good else Check(name, otherwise, found, expected, fix)


def check_interpreter(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Checks the Python version, given as (major, minor)."""
    return judge(
        "python",
        version == (3, 10),
        f"{version[0]}.{version[1]}",
        "3.10",
        "install Python 3.10 (pyenv install 3.10, or uv python install 3.10), then: rm -rf .venv && make env",
    )


def check_glibc(libc: tuple[str, str] | None = None) -> Check:
    """Checks the C library, given as (name, version); by default that of this process."""
    name, version = platform.libc_ver() if libc is None else libc
    return judge(
        "glibc",
        name == "glibc" and Version(version) >= Version(MINIMUM_GLIBC),
        f"{name} {version}".strip() or "none",
        f">= {MINIMUM_GLIBC}",
        "use a distribution with a newer glibc: Debian 10, Ubuntu 20.04, RHEL 8 or later; not Alpine",
    )


def read_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Reads the instruction sets of the first core; empty where the file is absent or lists none."""
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return set(value.split())
    return set()


def check_cpu(flags: Collection[str]) -> Check:
    """Checks the instruction sets that the TensorFlow and ScaNN wheels were compiled for."""
    found = " ".join(flag for flag in (*REQUIRED_CPU_FLAGS, FAST_CPU_FLAG) if flag in flags) or "none of them"
    works = all(flag in flags for flag in REQUIRED_CPU_FLAGS)
    return judge(
        "cpu",
        works and FAST_CPU_FLAG in flags,
        found,
        f"{' '.join(REQUIRED_CPU_FLAGS)}; {FAST_CPU_FLAG} for speed",
        "use an x86-64 CPU of 2015 or later; in a virtual machine pass the host's through (QEMU: -cpu host)",
        "warn" if works else "fail",
    )


def installed_version(package: str) -> str | None:
    """Returns the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(distribution: str = DISTRIBUTION) -> list[Check]:
    """Checks the installed packages against the requirements that setup.py declares.

    Requirements pinned with `==` are the tested set and get a line each; the others share one line.
    """
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires(distribution) or []]
    except importlib.metadata.PackageNotFoundError:
        return [Check(distribution, "fail", "not installed", "installed in this environment", "make env")]
    checks = []
    broken = []
    wanted = [requirement for requirement in declared if requirement.marker is None]
    for requirement in wanted:
        found = installed_version(requirement.name)
        fits = found is not None and is_allowed(requirement, found)
        if str(requirement.specifier).startswith("=="):
            expected = str(requirement.specifier).removeprefix("==")
            checks.append(judge(requirement.name, fits, found or "not installed", expected, REBUILD))
        elif not fits:
            broken.append(f"{requirement} (found: {found or 'not installed'})")
    summary = ", ".join(broken) or f"{len(wanted) - len(checks)} as declared"
    checks.append(judge("other packages", not broken, summary, "as declared in setup.py", REBUILD))
    return checks


def is_allowed(requirement: Requirement, version: str) -> bool:
    """Tells whether a version satisfies a requirement; one that is no valid version does not."""
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def check_libraries(probe: str = LIBRARY_PROBE, timeout_s: float = LIBRARY_TIMEOUT_S) -> list[Check]:
    """Loads TensorFlow, Keras 2 and the ScaNN ops in a fresh process and searches a tiny index."""
    settings = {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", probe]
    try:
        process = subprocess.run(command, env=os.environ | settings, capture_output=True, timeout=timeout_s)
        output, trouble = process.stdout, describe_end(process.returncode, process.stderr.decode())
    except subprocess.TimeoutExpired as error:
        output, trouble = error.stdout or b"", f"no answer within {timeout_s:g} s"
    answers: dict[str, Any] = {}
    for line in output.splitlines():
        answers |= json.loads(line)

    if "keras" in answers:
        found = f"{answers['keras']}, loaded in {answers['keras_s']:.1f} s"
    else:
        answers["keras"], found = "", trouble
        trouble = "not reached: TensorFlow did not load"
    is_keras_2 = answers["keras"].startswith("2.")
    keras = judge("keras in use", is_keras_2, found, "2.x with TF_USE_LEGACY_KERAS=1", REBUILD)

    if "neighbour" in answers:
        found = f"found row {answers['neighbour']}, loaded in {answers['scann_s']:.1f} s"
    else:
        found = trouble
    scann = judge("scann ops", answers.get("neighbour") == 3, found, "load, and find row 3", REBUILD)
    return [keras, scann]


def describe_end(return_code: int, stderr: str) -> str:
    """Tells in one line why a process ended badly, for instance by SIGILL on a CPU that is too old."""
    if return_code < 0:
        return f"killed by {signal.Signals(-return_code).name}"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with code {return_code}"


def check_port(port: int) -> Check:
    """Checks that a TCP port can be listened on, and names the process that holds it when that is visible."""
    with socket.socket() as listener:
        # As servers do: a port whose last connections are still closing counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            holder = port_holder(port) or "another process"
            found = f"{error.strerror}: {holder}"
            return Check(f"port {port}", "warn", found, "free", f"stop {holder}, or serve on another port")
    return Check(f"port {port}", "ok", "free", "free")


def port_holder(port: int) -> str:
    """Names the process that listens on a port; empty when the system does not tell (another user's)."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
            return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""


def check_output_dir(output_dir: Path, minimum_gib: float = MINIMUM_FREE_DISK_GIB) -> Check:
    """Checks that the folder, or the one that it will be made in, is writable and has room for a run."""
    parent = output_dir.absolute()
    while not parent.exists():
        parent = parent.parent
    expected = f"writable, {minimum_gib:g} GiB free"
    other = "choose another --output-dir"
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return Check("output dir", "fail", f"{parent} is not a writable folder", expected, other)
    free_gib = shutil.disk_usage(parent).free / 2**30
    return judge(
        "output dir",
        free_gib >= minimum_gib,
        f"{free_gib:.1f} GiB free at {parent}",
        expected,
        f"free {minimum_gib - free_gib:.1f} GiB there, or {other}",
    )


def available_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the memory that a new process can use: the host's, or what a container's limit leaves."""
    available = psutil.virtual_memory().available
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def check_memory(available_bytes: int) -> Check:
    """Checks the memory that is available now."""
    available_gib = available_bytes / 2**30
    return judge(
        "memory",
        available_gib >= MINIMUM_MEMORY_GIB,
        f"{available_gib:.1f} GiB available",
        f">= {MINIMUM_MEMORY_GIB:g} GiB",
        "close other programs, or raise the container's memory limit",
        "warn",
    )


def run_checks(output_dir: Path, ports: Sequence[int]) -> list[Check]:
    """Runs every check; takes as long as one import of TensorFlow (5 to 20 s).

    Args:
      output_dir: where runs are to be written; need not exist.
      ports: TCP ports that the model server is to listen on.

    Returns:
      The checks in reading order. Nothing is raised for what is broken: that is the answer.
    """
    return [
        check_interpreter(),
        check_glibc(),
        check_cpu(read_cpu_flags()),
        *check_packages(),
        *check_libraries(),
        *(check_port(port) for port in ports),
        check_output_dir(output_dir),
        check_memory(available_memory_bytes()),
    ]


def render(checks: Sequence[Check]) -> Table:
    """Lays the checks out as a table; the fix stands under what was found."""
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table("check", "status", "found", "expected", box=None, pad_edge=False)
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\nfix: {check.fix}", style="bold")
        table.add_row(
            Text(check.name), Text(check.status, style=styles[check.status]), found, Text(check.expected)
        )
    return table
