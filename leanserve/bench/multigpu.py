"""`bench multigpu`: several ranks on several GPUs. Do they answer alike, and what does each one more bring?

Everything runs as it is served: a process and a GPU per rank, NCCL between them. With device "cpu" the same runs over
Gloo, which shows that the script works and says nothing about GPUs.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leanserve.bench.leanserve_ranks import run_rank
from leanserve.bench.machine import Machine, describe_machine
from leanserve.bench.random_model import ModelShape, make_checkpoint
from leanserve.bench.system import System
from leanserve.bench.task import Cell, DTypeName, Task
from leanserve.contracts.config import Device
from leanserve.contracts.errors import ConfigError
from leanserve.launch.threads import available_cores
from leanserve.worker.device import usable_gpus

__all__ = ["MultigpuGrid", "MultigpuReport", "gpus_for", "print_multigpu_report", "run_multigpu_bench"]


@dataclass(frozen=True, kw_only=True)
class MultigpuGrid:
    """What is to be measured."""

    ranks: tuple[int, ...]
    """Rank counts, the first being what the others are compared with."""
    device: Device
    dtype: DTypeName
    """Of the timed cells; parity is looked at in float32."""
    parity_tokens: int
    """Prompt tokens, in each of three sequences."""
    prefill_tokens: tuple[int, ...]
    decode_tokens: tuple[int, ...]
    model: ModelShape


class RanksReport(msgspec.Struct, kw_only=True):
    """One rank count."""

    ranks: int
    differing_tokens: int | None = None
    """Of all greedy tokens in float32, those unlike the first rank count's; None for that one itself."""
    prefill_tokens_per_s: dict[int, float] = {}
    """By prompt tokens."""
    decode_ms: dict[int, float] = {}
    """A token's median time, by context tokens."""


class MultigpuReport(msgspec.Struct, kw_only=True):
    """One run of `bench multigpu`."""

    benchmark: str
    machine: Machine
    device: str
    dtype: str
    model: ModelShape
    by_ranks: list[RanksReport]
    not_shown: list[str]
    """What this run could not show, and why."""

    @property
    def all_alike(self) -> bool:
        return not any(report.differing_tokens for report in self.by_ranks)

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(msgspec.to_builtins(self, str_keys=True)), indent=2) + b"\n"


def gpus_for(ranks: tuple[int, ...] | None) -> tuple[int, ...]:
    """Rank counts to run on this machine's GPUs: as asked, else 1, 2, 4, ... and all of them.

    Raises:
        ConfigError: there are too few GPUs; says how many, and what can be run here all the same.
    """
    gpus = usable_gpus()
    wanted = max(ranks or (2,))
    if gpus.count < wanted:
        raise ConfigError(
            f"{wanted} ranks under NCCL need {wanted} GPUs, and {gpus.count} can be used here"
            f"{f' ({gpus.reason})' if gpus.reason else ''}. Nothing of parity, graphs and scaling on GPUs is shown on "
            "this machine; --device cpu runs the same comparison over Gloo, and `pytest -m gpu` what one GPU can show"
        )
    if ranks is not None:
        return ranks
    return tuple(sorted({1 << n for n in range(gpus.count.bit_length())} | {gpus.count}))


def run_multigpu_bench(grid: MultigpuGrid, console: Console) -> MultigpuReport:
    """Run every rank count in turn; each has the machine to itself.

    Raises:
        EngineError: ranks ended while they were measured.
    """
    not_shown: list[str] = []
    if grid.device == "cpu":
        not_shown.append("GPUs, NCCL and CUDA graphs: these ranks shared one CPU, so speed says nothing about scaling")
    report = MultigpuReport(
        benchmark="multigpu",
        machine=describe_machine(),
        device=grid.device,
        dtype=grid.dtype,
        model=grid.model,
        by_ranks=[],
        not_shown=not_shown,
    )
    with tempfile.TemporaryDirectory(prefix="leanserve-bench-") as name:
        folder = Path(name)
        model_dir = folder / "model"
        model_dir.mkdir()
        make_checkpoint(grid.model, model_dir)
        truth: list[list[int]] | None = None
        for size in grid.ranks:
            meeting_place = folder / f"ranks-{size}"
            meeting_place.mkdir()
            threads = max(1, available_cores() // size)
            system = System(f"{size} rank(s)", size, run_rank, size, threads, model_dir, meeting_place, grid.device)
            with ExitStack() as stack:
                stack.enter_context(system)
                token_ids, measured = _measure(grid, size, system, console)
            if truth is None:
                truth = token_ids
            else:
                pairs = zip(chain(*truth), chain(*token_ids), strict=True)
                measured.differing_tokens = sum(one != other for one, other in pairs)
            report.by_ranks.append(measured)
    return report


def _measure(grid: MultigpuGrid, size: int, system: System, console: Console) -> tuple[list[list[int]], RanksReport]:
    """The tokens that a rank count answers, and its figures."""
    console.print(f"{system.name}: parity ...")
    token_ids = system.measure(Task(Cell("float32", grid.parity_tokens, 3), "tokens")).token_ids
    measured = RanksReport(ranks=size)
    for tokens in grid.prefill_tokens:
        console.print(f"{system.name}: prefill of {tokens} tokens ...")
        seconds = system.measure(Task(Cell(grid.dtype, tokens, 1), "first token")).seconds
        measured.prefill_tokens_per_s[tokens] = round(tokens / seconds, 1)
    for tokens in grid.decode_tokens:
        console.print(f"{system.name}: decode behind {tokens} tokens ...")
        seconds = system.measure(Task(Cell(grid.dtype, tokens, 1), "decode")).seconds
        measured.decode_ms[tokens] = round(seconds * 1e3, 3)
    return token_ids, measured


def print_multigpu_report(report: MultigpuReport, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("ranks", justify="right")
    table.add_column("greedy tokens")
    first = report.by_ranks[0]
    for tokens in first.prefill_tokens_per_s:
        table.add_column(f"prefill {tokens},\ntokens/s", justify="right")
    for tokens in first.decode_ms:
        table.add_column(f"decode {tokens},\nms a token", justify="right")
    for measured in report.by_ranks:
        same = {None: "-", 0: "the same"}.get(measured.differing_tokens, f"{measured.differing_tokens} differ")
        figures = [*measured.prefill_tokens_per_s.values(), *measured.decode_ms.values()]
        table.add_row(str(measured.ranks), same, *(f"{figure:,.2f}" for figure in figures))
    console.print(table)
    for missing in report.not_shown:
        console.print(f"Not shown: {missing}.", highlight=False)
