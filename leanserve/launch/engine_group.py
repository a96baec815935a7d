"""An engine as its owner sees it: a run directory, the ranks' process, and the client that talks to rank 0."""

import asyncio
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from leanserve.contracts.config import EngineConfig
from leanserve.contracts.machine import this_machine
from leanserve.contracts.messages import EngineInfo, Pulse
from leanserve.launch.lifeline import is_ours, is_stopped
from leanserve.launch.nodes import Nodes
from leanserve.launch.own_address import address_towards
from leanserve.launch.ranks_process import RanksProcess
from leanserve.launch.run_dir import engine_address, pulse_address
from leanserve.server.engine_client import EngineClient, Recovery
from leanserve.server.lasting_task import start_lasting

__all__ = ["EngineGroup", "Recovery"]

logger = logging.getLogger("leanserve.launch")

STOP_PATIENCE_S = 5.0
"""How long ranks may take to end by themselves once told."""
POLL_S = 0.2
STUCK_PATIENCE_S = 1.5
"""Beyond the step timeout, for ranks to give up by themselves."""
STACKS_S = 0.3
"""For a rank to write its stacks before it is killed."""
ARRIVAL_TIMEOUT_S = 120.0
"""For a rank 0 to come, where all ranks are on this machine."""


class EngineGroup:
    """Starts ranks, or waits for ranks that torchrun started; kills those that are stuck; ends all of them and removes
    the run directory.

    Belongs to one event loop.

    Args:
        num_ranks: ranks to start here; None when they run already and will connect.
        run_dir: from `make_run_dir`; it goes when the group is closed.
        recovery: what to do when a rank fails; None: the group fails with it.
        pulse_host: this machine's address, where ranks on other machines take part.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_ranks: int | None,
        run_dir: Path,
        nodes: Nodes | None = None,
        recovery: Recovery | None = None,
        pulse_host: str | None = None,
    ) -> None:
        self._num_ranks = num_ranks
        self._run_dir = run_dir
        self._nodes = nodes or Nodes()
        self._ranks: RanksProcess | None = None
        self._watch: asyncio.Task[None] | None = None
        if self._nodes.count > 1:
            pulse_host = address_towards(self._nodes.host)
        self.client = EngineClient(
            engine_address(run_dir),
            config,
            pulse_address=pulse_address(run_dir) if pulse_host is None else f"tcp://{pulse_host}:*",
            step_timeout_s=config.step_timeout_s,
            recovery=recovery,
        )

    async def start(self) -> None:
        self.client.start()
        if self._num_ranks is not None:
            self._ranks = RanksProcess(self._num_ranks, self._run_dir, self._nodes)
        self._watch = start_lasting(self._watch_ranks(), "ranks", self.client.fail)

    async def wait_ready(self) -> EngineInfo:
        """Wait for the model to be loaded on every rank.

        Raises:
            EngineError: it could not be; the message says why.
        """
        return await self.client.engine.wait_ready()

    async def close(self) -> None:
        """End the ranks, in order if they can, and remove what they left. Safe to call in any state."""
        if self._watch is not None:
            self._watch.cancel()
        self.client.shut_down_engine()
        if self._ranks is not None:
            patience_s = STOP_PATIENCE_S if self.client.engine.state == "ready" else 0.0
            pids = [heard.pulse.pid for heard in self.client.health.ranks.values() if _is_here(heard.pulse)]
            await asyncio.to_thread(self._ranks.stop, patience_s)
            _kill(filter(is_stopped, pids), signal.SIGKILL)  # such a one does not see that all the others have ended
        await self.client.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    async def _watch_ranks(self) -> None:
        while self.client.engine.state != "failed":
            await asyncio.sleep(POLL_S)
            if self._ranks is not None and self._ranks.exit_code is not None:
                self.client.fail(f"the ranks have ended (exit code {self._ranks.exit_code})")
            elif self._nodes.count == 1 and self.client.engine.vacant_s > ARRIVAL_TIMEOUT_S:
                self.client.fail(f"no rank 0 has come within {ARRIVAL_TIMEOUT_S:.0f} s")
            else:
                await self._end_stuck_ranks()

    async def _end_stuck_ranks(self) -> None:
        """Kill ranks of this machine that had their time, and did not end by themselves: a single rank that is stopped
        has no neighbour to do it."""
        health = self.client.health
        stuck = {
            rank: (what, health.ranks[rank].pulse)
            for rank, what in health.troubled(time.monotonic(), patience_s=STUCK_PATIENCE_S).items()
        }
        local_pids = [pulse.pid for _, pulse in stuck.values() if _is_here(pulse)]
        for number in (signal.SIGUSR1, signal.SIGKILL):
            _kill(local_pids, number)
            if local_pids:
                await asyncio.sleep(STACKS_S)
        if stuck:
            self.client.lose("; ".join(what for what, _ in stuck.values()))


def _is_here(pulse: Pulse) -> bool:
    """Its rank runs on this machine."""
    return pulse.host == this_machine()


def _kill(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in filter(is_ours, pids):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
        except PermissionError as error:  # were it a rank still, ARRIVAL_TIMEOUT_S would end the engine
            extra = {"event": "rank_not_signalled", "pid": pid}
            logger.warning("process %d cannot be sent %s: %s", pid, number.name, error, extra=extra)
