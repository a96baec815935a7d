"""Several hosts on one machine: network namespaces on a bridge, each with a host name of its own. Needs root."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NETWORK = "10.231.7"
RENDEZVOUS_PORT = 29400


class Hosts:
    """`count` hosts with the addresses 10.231.7.1 and on; this process reaches all of them.

    Names carry the process id, so that two runs do not meet.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._tag = f"ls{os.getpid() % 100_000}"

    def address(self, host: int) -> str:
        return f"{NETWORK}.{host + 1}"

    def name(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def set_up(self) -> None:
        ip(f"link add {self._tag} type bridge")
        ip(f"addr add {NETWORK}.254/24 dev {self._tag}")
        ip(f"link set {self._tag} up")
        for host in range(self.count):
            name = self.name(host)
            ip(f"netns add {name}")
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} master {self._tag} up")
            ip(f"-n {name} addr add {self.address(host)}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")

    def take_down(self) -> None:
        for host in range(self.count):
            ip(f"netns del {self.name(host)}", check=False)
            ip(f"link del {self.name(host)}", check=False)
        ip(f"link del {self._tag}", check=False)

    def cut(self, host: int) -> None:
        """Pull the cable: nothing arrives, and nobody is told."""
        ip(f"link set {self.name(host)} down")

    def mend(self, host: int) -> None:
        ip(f"link set {self.name(host)} up")

    def serve(self, host: int, arguments: tuple[str, ...], log: Path) -> "subprocess.Popen[bytes]":
        """`leanserve serve` on a host, as one of all."""
        inside = ["ip", "netns", "exec", self.name(host), "unshare", "--uts", "sh", "-c"]
        start = [f'hostname {self.name(host)} && exec "$@"', "sh", sys.executable, "-m", "leanserve", "serve"]
        nodes = ["--nnodes", str(self.count), "--node-rank", str(host)]
        meeting = ["--rdzv-endpoint", f"{self.address(0)}:{RENDEZVOUS_PORT}"]
        with log.open("wb") as output:
            return subprocess.Popen(
                [*inside, *start, *arguments, *nodes, *meeting],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "200"},
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


def ip(command: str, *, check: bool = True) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"ip {command}: {done.stderr.strip()}")
