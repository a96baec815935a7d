"""Where a benchmark ran, and how fast that machine can read its memory."""

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from leanserve import __version__
from leanserve.launch.threads import available_cores

__all__ = ["Machine", "describe_machine", "describe_others", "gpu_read_bandwidth", "load_average", "read_bandwidth"]

READ_BYTES = 512 * 2**20
"""Far more than any cache holds."""
READ_RUNS = 8
GPU_READ_BYTES = 4 * 2**30
BUSY_LOAD = 0.5
"""A load average above this, before the run, is somebody else's work."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What one has to know to compare figures."""

    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float
    system: str
    python: str
    versions: dict[str, str]
    commit: str | None
    """Of the source tree, `-dirty` where it was changed; None where it is no git checkout."""
    date: str
    """UTC, ISO 8601."""
    load_average: float
    """Processes that wanted a core, over the minute before the run: above 0, somebody else was at work."""


def describe_machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=_cpu_name(),
        cores=available_cores(),
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        system=" ".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        python=platform.python_version(),
        versions={"leanserve": __version__} | {name: version(name) for name in ("torch", "transformers", "numpy")},
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        load_average=load_average(),
    )


def load_average() -> float:
    """Processes that ran or wanted to, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def describe_others(machine: Machine) -> list[str]:
    """What a reader must know of others' work before the run, if there was any."""
    if machine.load_average <= BUSY_LOAD:
        return []
    seen = f"load {machine.load_average:.1f} on {machine.cores} cores before the run"
    return [
        f"other processes ran on this machine ({seen}): every figure is slower than its own, and ratios are less sure"
    ]


def read_bandwidth() -> float:
    """Bytes per second that all of torch's threads together read from memory: the best of a few plain reductions."""
    data = torch.ones(READ_BYTES // 4)
    best_s = float("inf")
    for _ in range(READ_RUNS):
        for read in (data.sum, data.amax):
            started = time.perf_counter()
            read()
            best_s = min(best_s, time.perf_counter() - started)
    return READ_BYTES / best_s


def gpu_read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a GPU reads from its memory: the best of a few plain reductions, by its own clock."""
    data = torch.ones(GPU_READ_BYTES // 4, device=device)
    best_ms = float("inf")
    for _ in range(READ_RUNS):
        for read in (data.sum, data.amax):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            read()
            end.record()
            end.synchronize()
            best_ms = min(best_ms, start.elapsed_time(end))
    return GPU_READ_BYTES / best_ms * 1e3


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in somebody else's checkout
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
