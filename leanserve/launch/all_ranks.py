"""Steps on all ranks: rank 0's engine plans and launches them, every other rank follows. Knows no processes."""

from leanserve.contracts.batch import Batch, StepResult, Stop
from leanserve.contracts.config import EngineConfig
from leanserve.distributed.channel import StepReceiver, StepSender
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.launch.loading import LoadedRank
from leanserve.launch.step_watch import StepWatch
from leanserve.worker.runner import Runner

__all__ = ["AllRanks", "follow", "make_engine"]

COLLECT_AFTER_MS = 50
"""After a launch without another, a rank waits for the device instead of rank 0."""


class AllRanks:
    """The engine's executor: every step goes out to the other ranks before it is launched here."""

    def __init__(self, runner: Runner, sender: StepSender, watch: StepWatch | None = None) -> None:
        self._runner = runner
        self._sender = sender
        self._watch = watch

    def launch(self, batch: Batch) -> None:
        self._sender.send(batch)
        if self._watch is not None:
            self._watch.begin()
        self._runner.launch(batch)

    def collect(self) -> StepResult:
        result = self._runner.collect()
        if self._watch is not None:
            self._watch.end(result.step)
        return result


def make_engine(
    loaded: LoadedRank,
    config: EngineConfig,
    sender: StepSender,
    watch: StepWatch | None = None,
    *,
    overlap: bool | None = None,
) -> Engine:
    """The engine of rank 0.

    Args:
        overlap: as of Engine. None: where it pays, which is where a launch does not wait for the device.
    """
    info = loaded.info
    scheduler = Scheduler(loaded.sharding, config.batch, info.max_context_tokens, prefix_cache=info.prefix_cache)
    return Engine(
        scheduler,
        AllRanks(loaded.runner, sender, watch),
        info.eos_token_ids,
        overlap=info.captures_graphs if overlap is None else overlap,
    )


def follow(loaded: LoadedRank, receiver: StepReceiver, watch: StepWatch | None = None) -> None:
    """Execute what rank 0 says until it says stop.

    A step is collected where rank 0 collected it: before the next one is launched, or after that. Where nothing follows
    for a while, the last one is.
    """
    runner = loaded.runner

    def collect(until_step: int) -> None:
        """All steps in flight up to this one."""
        while runner.steps_in_flight and runner.steps_in_flight[0] <= until_step:
            step = runner.collect().step
            if watch is not None:
                watch.end(step)

    try:
        newest = 0
        while not isinstance(message := receiver.receive(COLLECT_AFTER_MS if runner.steps_in_flight else None), Stop):
            collect(message.checked_step if isinstance(message, Batch) else newest)
            if message is None:
                continue
            if watch is not None:
                watch.begin()
            if isinstance(message, Batch):
                runner.launch(message)
                newest = message.step
                collect(newest - 1)
            else:
                runner.compare_pasts()
                if watch is not None:
                    watch.end()
        collect(newest)
    finally:
        receiver.close()
