"""Which CPUs there are to use, and who gets them."""

import os

import pytest

from schema.errors import ConfigError
from serving import cores
from serving.cores import deal_out_cpus, usable_cpus


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Puts up a machine: package and core by CPU, of which this process may use all, or those of `usable`."""

    def put_up(places, usable=None):
        for cpu, (package, core) in places.items():
            topology = tmp_path / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            (topology / "physical_package_id").write_text(f"{package}\n")
            (topology / "core_id").write_text(f"{core}\n")
        monkeypatch.setattr(cores, "_SYSFS", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(usable or places))

    return put_up


SIBLINGS_APART = {cpu: (0, cpu % 4) for cpu in range(8)}  # cpu and cpu + 4 are one core
SIBLINGS_ADJACENT = {cpu: (0, cpu // 2) for cpu in range(8)}
# Two packages with two cores each; the kernel counts through the packages, and cores anew in each.
PACKAGES_IN_TURNS = {cpu: (cpu % 2, cpu // 2 % 2) for cpu in range(8)}


@pytest.mark.parametrize(
    ("places", "num_workers", "expected"),
    [
        (SIBLINGS_APART, 2, [[0, 4, 1, 5], [2, 6, 3, 7]]),
        (SIBLINGS_APART, 3, [[0, 4], [1, 5], [2, 6, 3, 7]]),
        (SIBLINGS_APART, 4, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (SIBLINGS_APART, 5, [[0], [4, 1], [5], [2, 6], [3, 7]]),
        (SIBLINGS_APART, 8, [[0], [4], [1], [5], [2], [6], [3], [7]]),
        (SIBLINGS_ADJACENT, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (PACKAGES_IN_TURNS, 2, [[0, 4, 2, 6], [1, 5, 3, 7]]),
        (PACKAGES_IN_TURNS, 1, [[0, 4, 2, 6, 1, 5, 3, 7]]),
    ],
)
def test_siblings_and_packages_stay_together(machine, caplog, places, num_workers, expected):
    machine(places)
    assert deal_out_cpus(num_workers) == expected
    assert not caplog.records


def test_only_usable_cpus_are_dealt_out(machine):
    machine(SIBLINGS_APART, usable={1, 2, 3, 5, 6})
    assert deal_out_cpus(2) == [[1, 5], [2, 6, 3]]


@pytest.mark.parametrize("damage", ["missing", "no number"])
def test_cpus_are_dealt_out_in_their_order_where_the_topology_cannot_be_read(
    machine, caplog, tmp_path, damage
):
    machine(SIBLINGS_APART)
    file = tmp_path / "cpu7" / "topology" / "core_id"
    file.unlink() if damage == "missing" else file.write_text("?")
    assert deal_out_cpus(2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert "two workers may share a core" in caplog.text


def test_more_workers_than_cpus_cannot_be_pinned(machine):
    machine({0: (0, 0), 1: (0, 1)})
    with pytest.raises(ConfigError, match="--num_workers=3 and there are 2 to use"):
        deal_out_cpus(3)


def test_workers_cannot_be_pinned_where_the_system_has_no_call_for_it(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(ConfigError, match="as Linux does"):
        deal_out_cpus(2)


def test_all_cpus_are_usable_where_the_system_does_not_tell_which(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cpus() == [0, 1, 2]
