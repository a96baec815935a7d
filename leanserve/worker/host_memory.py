"""Memory that this process may take of its host: what the kernel has free, and what the cgroups that it is in allow.
The server and `leanserve doctor` both count with it. Knows no torch.

A limit may stand on any level above the process: systemd sets `MemoryMax` on the service or on its slice, Slurm on the
job and not on the step's tasks, a container runtime on the container, which may look like the root from inside.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CgroupMemory", "available_host_bytes", "cgroup_memory", "installed_bytes"]

_ROOT = Path("/")
_NO_LIMIT = 1 << 60
"""Version 1 says so with a number near 2**63."""


@dataclass(frozen=True)
class CgroupMemory:
    """What the cgroups of this process leave it, all their levels together."""

    limit_bytes: int
    """The tightest limit."""
    free_bytes: int
    """Below the level with the least room. What a cgroup holds of files is free: it makes room, and the weights that
    were just read are among them."""


def cgroup_memory(root: Path = _ROOT) -> CgroupMemory | None:
    """Of this process; None where nothing limits it.

    Args:
        root: where `proc` and `sys` are.
    """
    levels = list(_limited_levels(root))
    if not levels:
        return None
    return CgroupMemory(min(level.limit_bytes for level in levels), min(level.free_bytes for level in levels))


def available_host_bytes(root: Path = _ROOT) -> int:
    """Free host memory, or what is free in this process's cgroups where that is less."""
    cgroup = cgroup_memory(root)
    free = _free_bytes(root)
    return max(free if cgroup is None else min(free, cgroup.free_bytes), 0)


def installed_bytes() -> int:
    """The host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return installed_bytes() // 2  # no /proc


def _limited_levels(root: Path) -> Iterator[CgroupMemory]:
    """The levels that have a limit, from this process's own up to the root of what is mounted here."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            levels = map(_read_v2, _upwards(mount, path))
        elif "memory" in controllers.split(","):
            levels = map(_read_v1, _upwards(mount / "memory", path))
        else:
            continue
        yield from (level for level in levels if level is not None)


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """Directories of a cgroup and of all above it. A container's path may be one of the host's, of which only the end,
    the mount itself, is seen here; `..` stands for what is not seen."""
    names = Path(path).parts[1:]
    if ".." in names:
        names = ()
    for count in range(len(names), -1, -1):
        yield mount.joinpath(*names[:count])


def _read_v2(cgroup: Path) -> CgroupMemory | None:
    """https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files"""
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" is no number, and no limit
        held, stat = int((cgroup / "memory.current").read_text()), _stat(cgroup)
        return CgroupMemory(limit, limit - held + stat["inactive_file"] + stat["active_file"])
    except (KeyError, OSError, ValueError):
        return None


def _read_v1(cgroup: Path) -> CgroupMemory | None:
    """https://docs.kernel.org/admin-guide/cgroup-v1/memory.html: the hierarchical limit is the tightest from here to
    the host's root, also of levels that are not seen here."""
    try:
        held, stat = int((cgroup / "memory.usage_in_bytes").read_text()), _stat(cgroup)
        limit = min(int((cgroup / "memory.limit_in_bytes").read_text()), stat["hierarchical_memory_limit"])
        free = limit - held + stat["total_inactive_file"] + stat["total_active_file"]
    except (KeyError, OSError, ValueError):
        return None
    return CgroupMemory(limit, free) if limit < _NO_LIMIT else None


def _stat(cgroup: Path) -> dict[str, int]:
    return {name: int(value) for name, value in map(str.split, (cgroup / "memory.stat").read_text().splitlines())}
