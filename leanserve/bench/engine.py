"""`bench engine`: the whole grid in one run, every system in turn at every cell."""

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from leanserve.bench.floor import decode_read_bytes, kv_bytes
from leanserve.bench.leanserve_ranks import PAGE_TOKENS
from leanserve.bench.lineup import line_up
from leanserve.bench.machine import Machine, describe_machine, describe_others, load_average, read_bandwidth
from leanserve.bench.random_model import ModelShape, make_checkpoint
from leanserve.bench.report import CellReport, EngineReport, Settings, SystemFigures
from leanserve.bench.system import System
from leanserve.bench.task import Cell, DTypeName, Quantity, Task, Timing
from leanserve.bench.transformers_peer import ATTENTION
from leanserve.contracts.config import CPU_BATCH
from leanserve.contracts.errors import EngineError
from leanserve.launch.threads import available_cores
from leanserve.model.architecture import Architecture
from leanserve.worker.host_memory import available_host_bytes

__all__ = ["Grid", "run_engine_bench"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is to be measured. The first cells come first in the report."""

    dtypes: tuple[DTypeName, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    ranks: tuple[int, ...]
    """Rank counts of LeanServe."""
    max_prefill_tokens: int | None
    """Cells with more prompt tokens in all get no time to first token; None: every cell does."""
    model: ModelShape

    def cells(self) -> list[Cell]:
        return [Cell(d, context, batch) for d in self.dtypes for context in self.contexts for batch in self.batches]


def run_engine_bench(grid: Grid, console: Console) -> EngineReport:
    """Measure every cell, drawing progress on `console`.

    Where a measured system fails, or Ctrl-C is pressed, the report holds what was measured until then and says so.
    """
    machine = describe_machine()
    threads = int(os.environ.get("OMP_NUM_THREADS") or available_cores())
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leanserve-bench-")))
        model_dir = folder / "model"
        model_dir.mkdir()
        architecture = make_checkpoint(grid.model, model_dir)
        bytes_per_s = read_bandwidth()
        systems = [stack.enter_context(system) for system in line_up(grid.ranks, threads, model_dir, folder)]
        cells = [_empty_report(cell, architecture, bytes_per_s, systems) for cell in grid.cells()]
        for cell in cells:
            cell.not_measured = _left_out(cell.cell, grid, architecture)
        # All of decode first: it is what most come for, and the long prefills would keep it waiting.
        tasks = [
            (cell, Task(cell.cell, quantity), system)
            for quantity in ("decode", "first token")
            for cell in cells
            for system in systems
            if quantity not in cell.not_measured
        ]
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        bar = stack.enter_context(Progress(*columns, console=console, transient=True))
        row = bar.add_task("", total=len(tasks))
        ended_early = None
        try:
            for cell, task, system in tasks:
                bar.update(row, description=f"{_describe(task)}: {system.name}")
                _note(cell.systems[system.name], task, system.measure(task))
                bar.advance(row)
        except KeyboardInterrupt:
            ended_early = "stopped by Ctrl-C"
        except EngineError as error:
            ended_early = str(error)
    return EngineReport(
        benchmark="engine",
        machine=machine,
        settings=Settings(
            threads=threads,
            page_tokens=PAGE_TOKENS,
            max_batch_tokens=CPU_BATCH.max_batch_tokens,
            max_prefill_step_tokens=CPU_BATCH.longest_step_tokens,
            attn_implementation=ATTENTION,
            decode_on="caches filled with random numbers, on both sides",
            read_bytes_per_s=round(bytes_per_s),
            load_average_after=load_average(),
        ),
        model=grid.model,
        ended_early=ended_early,
        caveats=_caveats(machine, threads),
        cells=cells,
    )


def _caveats(machine: Machine, threads: int) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = describe_others(machine)
    if threads != machine.cores:
        found.append(f"OMP_NUM_THREADS gave every system {threads} threads of {machine.cores} cores")
    return found


def _empty_report(cell: Cell, architecture: Architecture, bytes_per_s: float, systems: list[System]) -> CellReport:
    read_bytes = decode_read_bytes(architecture, _itemsize(cell), cell.context_tokens, cell.batch)
    return CellReport(
        cell=cell,
        decode_read_bytes=read_bytes,
        decode_floor_ms=round(read_bytes / bytes_per_s * 1e3, 3),
        systems={system.name: SystemFigures() for system in systems},
    )


def _itemsize(cell: Cell) -> int:
    return getattr(torch, cell.dtype).itemsize


def _left_out(cell: Cell, grid: Grid, architecture: Architecture) -> dict[Quantity, str]:
    """What is not measured at this cell, and why."""
    # The peer makes each layer's cache anew, longer by a token, while the old one is still there.
    cache_bytes = kv_bytes(architecture, _itemsize(cell), cell.context_tokens, cell.batch)
    cache_bytes *= 1 + 2 / architecture.num_layers
    needed_bytes = cache_bytes + 2 * architecture.num_parameters * _itemsize(cell)
    free_bytes = available_host_bytes()
    if needed_bytes > free_bytes:
        why = f"needs about {needed_bytes / 2**30:.0f} GiB of memory where {free_bytes / 2**30:.0f} GiB are free"
        where = f"{cell.dtype}, {cell.context_tokens} tokens, batch {cell.batch}"
        return {"decode": f"{where} {why}", "first token": f"{where} {why}"}
    limit = grid.max_prefill_tokens
    if limit is not None and cell.batch * cell.context_tokens > limit:
        return {"first token": f"cells of more than {limit} prompt tokens are left out; --all-prefills measures them"}
    return {}


def _describe(task: Task) -> str:
    cell = task.cell
    return f"{task.quantity}, {cell.dtype}, {cell.context_tokens} tokens, batch {cell.batch}"


def _note(figures: SystemFigures, task: Task, timing: Timing) -> None:
    if task.quantity == "decode":
        figures.decode_step_ms = round(timing.seconds * 1e3, 3)
        figures.decode_steps = timing.samples
        figures.decode_tokens_per_s = round(task.cell.batch / timing.seconds, 3)
    else:
        figures.first_token_s = round(timing.seconds, 6)
        figures.first_token_runs = timing.samples
