"""The CPUs that this process may use, and their sharing out among workers.

A CPU is what Linux numbers and schedules on. With hyper-threading a core is two of them, siblings, whose
numbers are seldom neighbours: often i and i + half their number.
"""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Final

from schema.errors import ConfigError

logger = logging.getLogger(__name__)

_SYSFS: Final = Path("/sys/devices/system/cpu")


def usable_cpus() -> list[int]:
    """Returns the numbers of the CPUs that this process may use now, ascending; never empty.

    They are fewer than the machine has in a container with a cpuset, under `taskset` and in a pinned worker.
    """
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def deal_out_cpus(num_workers: int) -> list[list[int]]:
    """Deals out the CPUs that this process may use evenly among workers.

    Neighbours of the topology stay together: no two workers share a core unless there are more workers than
    cores. Where the topology cannot be read, which the log tells, every CPU counts as a core.

    Raises:
      ConfigError: there are more workers than CPUs, or the system has no way to keep a process on CPUs.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("--pin_workers needs a system that keeps processes on cores, as Linux does")
    cpus = usable_cpus()
    if num_workers > len(cpus):
        raise ConfigError(
            f"--pin_workers gives each worker a core, but --num_workers={num_workers} and there are "
            f"{len(cpus)} to use; have at most that many workers, or leave --pin_workers out"
        )
    cores = _cores(cpus)
    if num_workers > len(cores):
        cores = [[cpu] for core in cores for cpu in core]
    bounds = [number * len(cores) // num_workers for number in range(num_workers + 1)]
    return [list(itertools.chain(*cores[first:end])) for first, end in itertools.pairwise(bounds)]


def _cores(cpus: list[int]) -> list[list[int]]:
    """Groups CPUs by their core; those of one package stand together."""
    try:
        places = {cpu: _place(cpu) for cpu in cpus}
    except (OSError, ValueError) as error:
        logger.warning("two workers may share a core: the topology of the CPUs cannot be read: %s", error)
        return [[cpu] for cpu in cpus]
    in_order = sorted(cpus, key=lambda cpu: (places[cpu], cpu))
    return [list(siblings) for _, siblings in itertools.groupby(in_order, key=places.__getitem__)]


def _place(cpu: int) -> tuple[int, int]:
    """Package and core of a CPU, as the kernel numbers them; OSError, ValueError: it does not tell."""
    topology = _SYSFS / f"cpu{cpu}" / "topology"
    package, core = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    return package, core
