"""What `bench gpu` found, as JSON for programs and as a table for people."""

from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leanserve.bench.machine import Machine
from leanserve.bench.random_model import ModelShape

__all__ = ["Check", "GpuCell", "GpuReport", "StepFigures", "print_gpu_report", "write_gpu_report"]


class StepFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A decode step of the whole batch: medians over `steps` of them."""

    step_ms: float
    """From one step's tokens to the next one's, on the host's clock."""
    forward_ms: float
    """Of it: inputs, layers and logits, by the device's clock."""
    sample_ms: float
    """Of it: the choice of tokens, by the device's clock."""
    schedule_ms: float
    """The engine's own work on the host: a part of it in the eager mode, and with graphs beside it."""
    tokens_per_s: float
    steps: int


class GpuCell(msgspec.Struct, frozen=True, kw_only=True):
    """One batch at one context length."""

    context_tokens: int
    batch: int
    read_bytes: int
    """Weights and KV: what a step cannot do without reading."""
    read_ms: float
    """The time to read them at the measured bandwidth."""
    figures: dict[str, StepFigures]
    """By mode: `graphs` and `unfused`, where there are graphs, and `eager`. unfused: graphs with PyTorch's operators
    between a layer's matrix products instead of one kernel for each operation."""


class Check(msgspec.Struct, frozen=True):
    """Something that must be so."""

    what: str
    passed: bool
    seen: str


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    benchmark: str
    machine: Machine
    device: str
    model: ModelShape
    dtype: str
    read_bytes_per_s: int
    capture_s: float | None
    """Capturing all graphs for the first time, compiling kernels included; None where there are none."""
    checks: list[Check]
    cells: list[GpuCell]
    left_out: list[str]
    """What the time did not allow."""
    seconds: float
    """The whole run."""


def write_gpu_report(report: GpuReport, folder: Path) -> None:
    (folder / "gpu.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def print_gpu_report(report: GpuReport, console: Console) -> None:
    machine = report.machine
    console.print(f"{report.device}, {report.dtype}, commit {machine.commit}", highlight=False)
    console.print(", ".join(f"{name} {version}" for name, version in machine.versions.items()), highlight=False)
    capture = "no graphs" if report.capture_s is None else f"graphs captured in {report.capture_s:.1f} s"
    console.print(
        f"memory is read at {report.read_bytes_per_s / 1e9:.0f} GB/s; {capture}; {report.seconds:.0f} s in all\n",
        highlight=False,
    )
    for check in report.checks:
        word = "[green]yes[/]" if check.passed else "[red]NO[/] "
        console.print(f"{word} {check.what}: {check.seen}", highlight=False)
    table = Table(title="\nDecode", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("context", "batch", "mode", "tokens/s", "step ms", "forward", "sample", "schedule", "read"):
        table.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=True)
    for cell in report.cells:
        for mode, seen in cell.figures.items():
            table.add_row(
                f"{cell.context_tokens:,}",
                str(cell.batch),
                mode,
                f"{seen.tokens_per_s:.0f}",
                *(f"{ms:.2f}" for ms in (seen.step_ms, seen.forward_ms, seen.sample_ms, seen.schedule_ms)),
                f"{cell.read_ms:.2f} {cell.read_ms / seen.step_ms:.0%}",
            )
    console.print(table)
    if report.left_out:
        console.print(f"No time was left for: {'; '.join(report.left_out)}.", highlight=False)
    console.print("read: the time to read weights and KV once, and how much of the step that is.")
    if any(len(cell.figures) > 1 for cell in report.cells):
        console.print("unfused: graphs with PyTorch's operators between a layer's matrix products.")
