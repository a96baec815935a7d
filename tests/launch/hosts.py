"""Several hosts on one machine: network namespaces on a bridge, each with a host name of its own. Needs root."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

NETNS_FILES = Path("/etc/netns")
"""What lies below a namespace's name here is seen in /etc inside it (ip-netns(8))."""
RENDEZVOUS_PORT = 29400


class Hosts:
    """`count` hosts on a network of their own; this process reaches all of them.

    Names and addresses follow from the process id, so that two runs do not meet.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        pid = os.getpid()
        self._tag = f"ls{pid % 100_000}"
        self._network = f"10.{200 + pid // 256 % 50}.{pid % 256}"

    def address(self, host: int) -> str:
        return f"{self._network}.{host + 1}"

    def name(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def set_up(self) -> None:
        ip(f"link add {self._tag} type bridge")
        ip(f"addr add {self._network}.254/24 dev {self._tag}")
        ip(f"link set {self._tag} up")
        for host in range(self.count):
            name = self.name(host)
            ip(f"netns add {name}")
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} master {self._tag} up")
            ip(f"-n {name} addr add {self.address(host)}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
            self._write_names(host)

    def _write_names(self, host: int) -> None:
        """/etc/hosts: everybody's address; a machine's own name means itself alone, as Debian installs it."""
        lines = [f"{self.address(other)} {self.name(other)}" for other in range(self.count) if other != host]
        (NETNS_FILES / self.name(host)).mkdir(parents=True)
        names = "\n".join(["127.0.0.1 localhost", f"127.0.1.1 {self.name(host)}", *lines])
        (NETNS_FILES / self.name(host) / "hosts").write_text(names + "\n")

    def take_down(self) -> None:
        for host in range(self.count):
            for pid in self.processes(host):  # whatever a test left running
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ip(f"netns del {self.name(host)}", check=False)
            ip(f"link del {self.name(host)}", check=False)
            shutil.rmtree(NETNS_FILES / self.name(host), ignore_errors=True)
        ip(f"link del {self._tag}", check=False)

    def processes(self, host: int) -> list[int]:
        """Ids of all that run on a host."""
        return [int(pid) for pid in ip(f"netns pids {self.name(host)}", check=False).split()]

    def cut(self, host: int) -> None:
        """Pull the cable: nothing arrives, and nobody is told."""
        ip(f"link set {self.name(host)} down")

    def mend(self, host: int) -> None:
        ip(f"link set {self.name(host)} up")

    def serve(self, host: int, arguments: tuple[str, ...], log: Path) -> "subprocess.Popen[bytes]":
        """`leanserve serve` on a host, as one of all."""
        nodes = ["--nnodes", str(self.count), "--node-rank", str(host)]
        meeting = ["--rdzv-endpoint", f"{self.address(0)}:{RENDEZVOUS_PORT}"]
        command = [sys.executable, "-m", "leanserve", "serve", *arguments, *nodes, *meeting]
        return self.run(host, command, log, {"COLUMNS": "200"})

    def run(
        self, host: int, command: Sequence[str], log: Path, environment: dict[str, str], *, before: str = "true"
    ) -> "subprocess.Popen[bytes]":
        """Any command on a host.

        Args:
            before: shell, run inside first; what it mounts nobody else sees.
        """
        inside = ["ip", "netns", "exec", self.name(host), "unshare", "--uts", "sh", "-ec"]
        start = [f'hostname {self.name(host)}\n{before}\nexec "$@"', "sh", *command]
        with log.open("wb") as output:
            return subprocess.Popen(
                [*inside, *start], stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
            )


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Set up, and gone afterwards."""
    made = Hosts(count)
    try:
        made.set_up()
        yield made
    finally:
        made.take_down()


def ip(command: str, *, check: bool = True) -> str:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"ip {command}: {done.stderr.strip()}")
    return done.stdout
