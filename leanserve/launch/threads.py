"""How many CPU threads a rank may use. torchrun sets OMP_NUM_THREADS to 1; only the user's own value counts."""

import os
from pathlib import Path

__all__ = ["available_cores", "default_threads", "user_set_threads"]


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
