"""`bench prefill`: what others wait beside a long prompt, and how fast each system computes, reads and reuses one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from leanserve.bench.host_cost import measure_host_cost
from leanserve.bench.lineup import line_up
from leanserve.bench.machine import describe_machine, describe_others, load_average
from leanserve.bench.prefill_report import Measured, PrefillReport
from leanserve.bench.random_model import ModelShape, make_checkpoint
from leanserve.bench.report import PEER
from leanserve.bench.task import Cell, Quantity, Task
from leanserve.bench.waits import measure_waits
from leanserve.contracts.errors import EngineError
from leanserve.launch.threads import available_cores

__all__ = ["PrefillGrid", "run_prefill_bench"]


@dataclass(frozen=True, kw_only=True)
class PrefillGrid:
    """What is to be measured."""

    host_tokens: int
    """Of the longest prompts that the engine is given without a model."""
    long_prompt_tokens: int
    """Of the prompt that others run beside."""
    prefill_tokens: tuple[int, ...]
    decode_tokens: tuple[int, ...]
    shared_tokens: int
    """Of the prefix in common."""
    sharers: int
    ranks: tuple[int, ...]
    model: ModelShape

    def tasks(self) -> Iterator[tuple[Quantity, int, int]]:
        """Quantity, context tokens and batch."""
        for tokens in self.prefill_tokens:
            yield "first token", tokens, 1
        for tokens in self.decode_tokens:
            yield "decode", tokens, 1
        yield "shared prefix", self.shared_tokens, self.sharers
        yield "unshared prefix", self.shared_tokens, self.sharers


def run_prefill_bench(grid: PrefillGrid, console: Console) -> PrefillReport:
    """Measure everything, saying on `console` what is at work.

    Where a measured system fails, or Ctrl-C is pressed, the report holds what was measured until then and says so.
    """
    machine = describe_machine()
    threads = int(os.environ.get("OMP_NUM_THREADS") or available_cores())
    torch.set_num_threads(threads)
    report = PrefillReport(
        benchmark="prefill", machine=machine, threads=threads, model=grid.model, caveats=describe_others(machine)
    )
    try:
        console.print("the engine's cost on the host ...")
        report.host_cost = measure_host_cost(grid.host_tokens)
        console.print(f"a prompt of {grid.long_prompt_tokens} tokens beside others ...")
        report.waits = measure_waits(grid.long_prompt_tokens)
        _measure_systems(grid, threads, report, console)
    except KeyboardInterrupt:
        report.ended_early = "stopped by Ctrl-C"
    except EngineError as error:
        report.ended_early = str(error)
    report.load_average_after = load_average()
    return report


def _measure_systems(grid: PrefillGrid, threads: int, report: PrefillReport, console: Console) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leanserve-bench-")))
        model_dir = folder / "model"
        model_dir.mkdir()
        make_checkpoint(grid.model, model_dir)
        systems = line_up(grid.ranks, threads, model_dir, folder)
        for system in systems:
            stack.enter_context(system)
        for quantity, tokens, batch in grid.tasks():
            measured = Measured(quantity=quantity, context_tokens=tokens, batch=batch)
            report.measured.append(measured)
            for system in systems:
                if system.name == PEER and quantity.endswith("prefix"):
                    continue  # generate has no cache that outlives a call; its unshared time is its first token's
                console.print(f"{quantity}, {tokens} tokens, batch {batch}: {system.name} ...")
                timing = system.measure(Task(Cell("float32", tokens, batch), quantity))
                measured.seconds[system.name] = round(timing.seconds, 6)
