"""What the operating system grants a server here: memory, shared memory, files, places for its sockets."""

import os
import resource
import shutil
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from leanserve.launch.open_files import allowed_open_files
from leanserve.launch.run_dir import takes_sockets
from leanserve.worker.host_memory import available_host_bytes, cgroup_memory, installed_bytes

__all__ = ["HostFacts", "gib", "host_facts", "judge_host"]

_LEAST_FILES = 4096
_LEAST_SHM = 1 << 30
_LEAST_MEMORY = 2 << 30


@dataclass(frozen=True)
class HostFacts:
    """Sizes in bytes; None where there is no such thing, or no limit."""

    memory: int
    available: int
    """Free, also by the limits of this process's cgroups."""
    cgroup_limit: int | None
    """The tightest of them."""
    shm_size: int | None
    shm_free: int | None
    open_files: int
    """That a server may have, which raises its own limit."""
    processes: int | None
    locked_memory: int | None
    temporary_dir: Path
    c_compiler: str | None
    """What Triton builds its launchers with, when a kernel is first launched."""
    python_header: Path | None
    """The Python.h that they need."""


def host_facts() -> HostFacts:
    """Look."""
    cgroup = cgroup_memory()
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return HostFacts(
        memory=installed_bytes(),
        available=available_host_bytes(),
        cgroup_limit=None if cgroup is None else cgroup.limit_bytes,
        shm_size=None if shm is None else shm.total,
        shm_free=None if shm is None else shm.free,
        open_files=allowed_open_files(),
        processes=_limit(resource.RLIMIT_NPROC),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        temporary_dir=Path(tempfile.gettempdir()),
        c_compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        python_header=header if (header := Path(sysconfig.get_path("include"), "Python.h")).exists() else None,
    )


def judge_host(facts: HostFacts, *, gpus: int) -> tuple[list[str], list[str]]:
    """What cannot work with so many GPUs, and what may be too little; each with what to do."""
    errors: list[str] = []
    warnings: list[str] = []
    if facts.shm_free is not None and facts.shm_free < _LEAST_SHM and gpus > 1:
        errors.append(
            f"/dev/shm has {gib(facts.shm_free)} free, and NCCL needs it between GPUs; start the container with "
            "--shm-size=1g or --ipc=host, or empty it"
        )
    if not takes_sockets(facts.temporary_dir):
        warnings.append(f"the path {facts.temporary_dir} is too long for sockets: they go to /tmp")
    if facts.c_compiler is None and gpus > 0:
        errors.append("there is no C compiler, and Triton builds its launchers with one; install gcc, or set CC")
    if facts.python_header is None and gpus > 0:
        errors.append(
            "Python.h is not there, and Triton builds its launchers with it; install Python's headers (python3-dev)"
        )
    if facts.open_files < _LEAST_FILES:
        warnings.append(
            f"a server may open {facts.open_files} files, and every client takes one; raise the hard limit: systemd's "
            "LimitNOFILE, a container's --ulimit nofile=65536, or /etc/security/limits.conf"
        )
    if facts.available < _LEAST_MEMORY:
        warnings.append(f"{gib(facts.available)} of memory can be had; weights and KV cache may not fit")
    return errors, warnings


def gib(size: int | None) -> str:
    """A size for people."""
    if size is None:
        return "none"
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"


def _limit(number: int) -> int | None:
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft
