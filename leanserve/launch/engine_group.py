"""An engine as its owner sees it: a run directory, the ranks' process, and the client that talks to rank 0."""

import asyncio
import shutil
import tempfile
from pathlib import Path

from leanserve.contracts.config import EngineConfig
from leanserve.contracts.messages import EngineInfo
from leanserve.launch.ranks_process import RanksProcess, engine_address
from leanserve.server.engine_client import EngineClient

__all__ = ["EngineGroup", "make_run_dir"]

STOP_PATIENCE_S = 5.0
"""How long ranks may take to end by themselves once told."""
POLL_S = 0.2


def make_run_dir() -> Path:
    """A directory for the sockets of one server, readable by this user alone."""
    return Path(tempfile.mkdtemp(prefix="leanserve-"))


class EngineGroup:
    """Starts ranks, or waits for ranks that torchrun started; ends them and removes the run directory.

    Belongs to one event loop.

    Args:
        num_ranks: ranks to start here; None when they run already and will connect.
        run_dir: from `make_run_dir`; it goes when the group is closed.
    """

    def __init__(self, config: EngineConfig, *, num_ranks: int | None, run_dir: Path) -> None:
        self._num_ranks = num_ranks
        self._run_dir = run_dir
        self._ranks: RanksProcess | None = None
        self._watch: asyncio.Task[None] | None = None
        self.client = EngineClient(engine_address(run_dir), config)

    async def start(self) -> None:
        self.client.start()
        if self._num_ranks is not None:
            self._ranks = RanksProcess(self._num_ranks, self._run_dir)
            self._watch = asyncio.create_task(self._watch_ranks(self._ranks), name="ranks")

    async def wait_ready(self) -> EngineInfo:
        """Wait for the model to be loaded on every rank.

        Raises:
            EngineError: it could not be; the message says why.
        """
        return await self.client.wait_ready()

    async def close(self) -> None:
        """End the ranks, in order if they can, and remove what they left. Safe to call in any state."""
        if self._watch is not None:
            self._watch.cancel()
        self.client.shut_down_engine()
        if self._ranks is not None:
            patience_s = STOP_PATIENCE_S if self.client.state == "ready" else 0.0
            await asyncio.to_thread(self._ranks.stop, patience_s)
        await self.client.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    async def _watch_ranks(self, ranks: RanksProcess) -> None:
        while ranks.exit_code is None:
            await asyncio.sleep(POLL_S)
        if self.client.state != "failed":
            self.client.fail(f"the ranks have ended (exit code {ranks.exit_code})")
