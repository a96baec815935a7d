"""How many CPU threads a rank may use, and how they wait for each other. torchrun sets OMP_NUM_THREADS to 1; only the
user's own value counts."""

import os
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["available_cores", "default_threads", "spin_briefly", "user_set_threads"]

_SPINS = "10000"


def available_cores() -> int:
    """Cores this process may use: its affinity mask, and the cgroup's CPU quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def default_threads(local_size: int) -> int:
    """CPU threads per rank: the cores, divided by the ranks of this machine."""
    return max(1, available_cores() // local_size)


def user_set_threads(agent_pid: int) -> bool:
    """Whether OMP_NUM_THREADS was set before torchrun started: the agent's own environment tells."""
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{agent_pid}/environ").read_bytes()
    except OSError:  # no /proc: take any value but torchrun's own 1 for the user's
        return os.environ.get("OMP_NUM_THREADS", "1") != "1"


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Let a rank's threads give their core away soon when one of them is late, unless the user says how they wait.

    To be said before torch is imported. GNU's OpenMP, of torch on Linux, spins 300,000 times by default, which is
    longer than a small model's whole layer. Where another process takes a core that costs all: the thread that spins
    keeps the one that it waits for from running, at every barrier. On idle cores so few spins lose nothing.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)
