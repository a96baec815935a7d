"""What is measured, what comes back, and when a measurement is long enough: the same for every system."""

import statistics
import time
from collections.abc import Callable
from typing import Literal

import msgspec

__all__ = ["MAX_STEPS", "Cell", "DTypeName", "Quantity", "StepClock", "Task", "Timing", "repeated"]

Quantity = Literal["decode", "first token", "shared prefix", "unshared prefix", "tokens"]
"""decode: seconds a step takes in which every sequence of the batch gets one token, its context being in the cache.
first token: seconds from handing over the prompts to a prompt's first token, mean over the batch; nothing is cached.
shared prefix: seconds until all of a batch have ended that begin with the same context and go on by 100 tokens of their
own and 8 new ones; unshared prefix: the same without the prefix cache. tokens: what each sequence was answered."""

DTypeName = Literal["float32", "bfloat16"]

MIN_STEPS, MAX_STEPS, STEPS_MAX_S = 5, 48, 5.0
MAX_RUNS, RUNS_MAX_S = 3, 4.0


class Cell(msgspec.Struct, frozen=True):
    """One place of the grid."""

    dtype: DTypeName
    """Of weights and KV."""
    context_tokens: int
    """Prompt tokens of each sequence."""
    batch: int
    """Sequences at once."""


class Task(msgspec.Struct, frozen=True):
    """One figure to be measured."""

    cell: Cell
    quantity: Quantity


class Timing(msgspec.Struct, frozen=True):
    """A measured figure."""

    seconds: float
    """The median."""
    samples: int
    """Steps or runs it is the median of."""
    token_ids: list[list[int]] = []
    """Of the quantity "tokens": 16 greedy ones of each sequence."""


class StepClock:
    """Times decode steps until there are enough: 48, or what fits in 5 seconds, but never fewer than 5."""

    def __init__(self) -> None:
        self._ticks: list[float] = []

    def tick(self) -> bool:
        """A step has ended. Returns whether enough were seen. The first one only starts the clock: it holds set-up."""
        self._ticks.append(time.perf_counter())
        steps = len(self._ticks) - 1
        return steps >= MAX_STEPS or (steps >= MIN_STEPS and self._ticks[-1] - self._ticks[0] >= STEPS_MAX_S)

    def timing(self) -> Timing:
        steps_s = [after - before for before, after in zip(self._ticks, self._ticks[1:], strict=False)]
        return Timing(seconds=statistics.median(steps_s), samples=len(steps_s))


def repeated(run: Callable[[], float]) -> Timing:
    """The median of up to three runs; of fewer where a run takes seconds."""
    runs_s: list[float] = []
    while len(runs_s) < MAX_RUNS and sum(runs_s) < RUNS_MAX_S:
        runs_s.append(run())
    return Timing(seconds=statistics.median(runs_s), samples=len(runs_s))
