"""Which cgroup's limit counts, over made-up trees of what the kernel shows."""

import subprocess
import sys
from pathlib import Path

import pytest

from leanserve.worker.host_memory import CgroupMemory, available_host_bytes, cgroup_memory

MIB = 1 << 20
JOB = "/system.slice/slurmstepd.scope/job_7"


def host(root: Path, own_cgroup: str, levels: dict[str, dict[str, str]]) -> Path:
    """A root whose /proc/self/cgroup says this, with these files in directories below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own_cgroup)
    (root / "proc/meminfo").write_text(f"MemTotal: {1 << 20} kB\nMemAvailable: {512 << 10} kB\n")
    for level, files in levels.items():
        directory = root / "sys/fs/cgroup" / level.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(f"{text}\n")
    return root


def v2(limit_mib: int | None, held_mib: int, files_mib: int = 0) -> dict[str, str]:
    return {
        "memory.max": "max" if limit_mib is None else str(limit_mib * MIB),
        "memory.current": str(held_mib * MIB),
        "memory.stat": f"anon 5\nfile {99 * MIB}\ninactive_file {files_mib * MIB}\nactive_file 0",
    }


def v1(limit_mib: int | None, held_mib: int, hierarchical_mib: int | None, files_mib: int = 0) -> dict[str, str]:
    none = 0x7FFFFFFFFFFFF000
    return {
        "memory.limit_in_bytes": str(none if limit_mib is None else limit_mib * MIB),
        "memory.usage_in_bytes": str(held_mib * MIB),
        "memory.stat": f"inactive_file 7\nhierarchical_memory_limit "
        f"{none if hierarchical_mib is None else hierarchical_mib * MIB}\n"
        f"total_inactive_file 0\ntotal_active_file {files_mib * MIB}",
    }


@pytest.mark.parametrize(
    ("own_cgroup", "levels", "limit_mib", "free_mib"),
    [
        pytest.param("0::/\n", {"/": v2(16, 16, files_mib=9)}, 16, 9, id="full of files"),
        pytest.param("0::/\n", {"/": {}}, None, 512, id="the host's root"),
        pytest.param("0::/a/b\n", {"/a": v2(None, 3), "/a/b": v2(None, 1)}, None, 512, id="no limit"),
        pytest.param(
            "0::/system.slice/leanserve.service\n",
            {"/system.slice": v2(None, 90), "/system.slice/leanserve.service": v2(64, 24)},
            64,
            40,
            id="systemd",
        ),
        pytest.param(
            f"0::{JOB}/step_0/user/task_0\n",
            {JOB: v2(100, 30, files_mib=10), f"{JOB}/step_0/user/task_0": v2(None, 20), "/": {}},
            100,
            80,
            id="Slurm's job",
        ),
        pytest.param("0::/a/b\n", {"/a": v2(100, 95), "/a/b": v2(50, 10)}, 50, 5, id="the wider limit has less room"),
        pytest.param("0::/a\n", {"/a": v2(100, 5), "/other": v2(1, 1)}, 100, 95, id="a neighbour's"),
        pytest.param("0::/../../elsewhere\n", {"/": v2(30, 10)}, 30, 20, id="outside this namespace"),
        pytest.param("0::/docker/abc\n", {"/": v2(30, 10)}, 30, 20, id="a container that sees the host's path"),
        pytest.param(
            "3:cpu,cpuacct:/\n2:memory:/slurm/uid_1/job_7\n",
            {"/memory/slurm/uid_1/job_7": v1(80, 30, 80, files_mib=5), "/memory": v1(None, 400, None)},
            80,
            55,
            id="version 1",
        ),
        pytest.param("2:memory:/docker/abc\n", {"/memory": v1(None, 10, 40)}, 40, 30, id="version 1, limited above"),
        pytest.param(
            "9:memory:/svc\n0::/svc\n", {"/memory/svc": v1(70, 10, 70), "/unified/svc": {}}, 70, 60, id="both versions"
        ),
        pytest.param("0::/a\n", {"/a": v2(40, 90)}, 40, 0, id="over its limit"),
        pytest.param("0::/a\n", {"/a": v2(None, 9) | {"memory.max": "?"}}, None, 512, id="not to be read"),
    ],
)
def test_the_tightest_level_counts(tmp_path, own_cgroup, levels, limit_mib, free_mib) -> None:
    root = host(tmp_path, own_cgroup, levels)
    cgroup = cgroup_memory(root)
    assert (None if cgroup is None else cgroup.limit_bytes) == (None if limit_mib is None else limit_mib * MIB)
    assert available_host_bytes(root) == free_mib * MIB


def test_a_machine_without_cgroups_has_no_limit(tmp_path) -> None:
    assert cgroup_memory(tmp_path) is None
    assert available_host_bytes(tmp_path) > 0  # half of what is installed


def test_a_limit_above_what_the_host_has_free_does_not_count(tmp_path) -> None:
    root = host(tmp_path, "0::/a\n", {"/a": v2(2048, 0)})
    assert cgroup_memory(root) == CgroupMemory(2048 * MIB, 2048 * MIB)
    assert available_host_bytes(root) == 512 * MIB


def test_doctor_looks_at_the_host_without_torch() -> None:
    code = "import sys, leanserve.launch.host_facts as h; h.host_facts(); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
