"""The ranks as seen by the process that starts them: one child, the agent."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec

from leanserve.contracts.config import Device
from leanserve.contracts.errors import ConfigError
from leanserve.launch.agent import WITHOUT_LIMIT
from leanserve.launch.nodes import Nodes
from leanserve.launch.run_dir import RUN_DIR_VARIABLE
from leanserve.launch.threads import default_threads

__all__ = ["RanksProcess", "count_gpus"]


class RanksProcess:
    """Starts `num_ranks` ranks on this machine, and ends them.

    Args:
        module: of this package, what a rank runs.
        max_restarts: how often all of them are started again after one has failed.
        output: takes what they print; None: they print where this process does.
    """

    def __init__(
        self,
        num_ranks: int,
        run_dir: Path,
        nodes: Nodes | None = None,
        *,
        module: str = "rank",
        max_restarts: int = WITHOUT_LIMIT,
        output: IO[bytes] | None = None,
    ) -> None:
        nodes = nodes or Nodes()
        environment = os.environ | {RUN_DIR_VARIABLE: str(run_dir)}
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(default_threads(num_ranks))
        if nodes.count == 1:
            # Ranks of one machine talk over loopback: no other interface is opened, and no host name is looked up.
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        arguments = (num_ranks, os.getpid(), nodes.count, nodes.endpoint or "", module, max_restarts)
        self._agent = subprocess.Popen(
            [sys.executable, "-m", "leanserve.launch.agent", *map(str, arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches the front end alone, which ends the ranks in order
        )

    @property
    def exit_code(self) -> int | None:
        """None while the agent runs."""
        return self._agent.poll()

    def stop(self, patience_s: float) -> None:
        """Wait for the ranks to end by themselves, then end them."""
        for signal_number, wait_s in ((None, patience_s), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            if signal_number is not None:
                self._agent.send_signal(signal_number)
            try:
                self._agent.wait(wait_s)
            except subprocess.TimeoutExpired:
                continue
            return


def count_gpus(device: Device) -> tuple[int, str | None]:
    """Usable GPUs, and the reason when a GPU is here but cannot be used.

    torch is asked in a process of its own, and only where a driver is present at all.

    Raises:
        ConfigError: `device` is "cuda" and no GPU can be used.
    """
    if device == "cpu":
        return 0, None
    if device == "auto" and not any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0, None
    answer = subprocess.run(
        [sys.executable, "-m", "leanserve.worker.device"], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        last = answer.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ConfigError(f"torch cannot be loaded: {last[0]}")
    found = msgspec.json.decode(answer.stdout.strip().splitlines()[-1])
    if found["count"] == 0 and device == "cuda":
        raise ConfigError(f"--device cuda: {found['reason']}")
    return found["count"], found["reason"]
