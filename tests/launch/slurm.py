"""A Slurm cluster on `hosts`: the distribution's own slurmctld on the first one, a slurmd on each. Needs root."""

import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.hosts import Hosts

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
GPUS_PER_NODE = 8
START_S = 30.0


class Slurm:
    """Nodes that say they have 32 cores and 8 GPUs, whatever the machine has: nothing confines a job to its share."""

    def __init__(self, net: Hosts, directory: Path) -> None:
        self._net = net
        self._directory = directory
        self._environment = {"SLURM_CONF": str(directory / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        directory, net = self._directory, self._net
        names = [net.name(host) for host in range(net.count)]
        (directory / "state").mkdir()
        for name in names:
            (directory / f"spool-{name}").mkdir()
        for gpu in range(GPUS_PER_NODE):
            os.mknod(directory / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (directory / "slurm.conf").write_text(
            f"ClusterName=test\nSlurmctldHost={names[0]}({net.address(0)})\n"
            # Neither a password daemon nor cgroups: these are hosts of one test.
            "AuthType=auth/none\nCredType=cred/none\nSlurmUser=root\nMailProg=/bin/true\nMpiDefault=none\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n"
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core_Memory\nSlurmdParameters=config_overrides\n"
            f"GresTypes=gpu\nStateSaveLocation={directory}/state\nSlurmdSpoolDir={directory}/spool-%n\n"
            f"SlurmctldPidFile={directory}/slurmctld.pid\nSlurmdPidFile={directory}/slurmd-%n.pid\n"
            + "".join(
                f"NodeName={name} NodeAddr={net.address(host)} CPUs=32 RealMemory=1000 Gres=gpu:{GPUS_PER_NODE}\n"
                for host, name in enumerate(names)
            )
            + "PartitionName=all Nodes=ALL Default=YES State=UP\n"
        )
        (directory / "gres.conf").write_text(f"Name=gpu File={directory}/gpu[0-{GPUS_PER_NODE - 1}]\n")
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # not used, and not looked for
        self._run(0, "slurmctld")
        for host in range(net.count):
            self._run(host, "slurmd")
        deadline = time.monotonic() + START_S
        while self.command("sinfo", "--noheader", "--Node", "--format=%T").split() != ["idle"] * net.count:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def _run(self, host: int, program: str) -> None:
        log = self._directory / f"{program}-{host}.log"
        self._daemons.append(self._net.run(host, [program, "-D"], log, self._environment))

    def command(self, *words: str, environment: dict[str, str] | None = None) -> str:
        """What a command says that a user types on the first host, in the cluster's directory."""
        done = subprocess.run(
            ["ip", "netns", "exec", self._net.name(0), *words],
            env=os.environ | self._environment | (environment or {}),
            cwd=self._directory,
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode != 0 and words[0] != "sinfo":  # which fails until slurmctld is there
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def log(self) -> str:
        """Of the daemons and of the jobs."""
        files = [*self._directory.glob("*.log"), *self._directory.glob("*.out")]
        return "\n".join(f"{file.name}:\n{file.read_text()[-5000:]}" for file in sorted(files))

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(20)


@contextmanager
def slurm(net: Hosts) -> Iterator[Slurm]:
    """Up on all of them, and gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: names of sockets end at about 100 characters
    made = Slurm(net, directory)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory)
