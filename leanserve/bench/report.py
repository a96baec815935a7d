"""What `bench engine` found: figures, ratios and the target; as JSON for programs, as tables for people."""

from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leanserve.bench.machine import Machine
from leanserve.bench.random_model import ModelShape
from leanserve.bench.task import Cell, Quantity

__all__ = ["PEER", "CellReport", "EngineReport", "Settings", "SystemFigures", "Target", "print_report", "write_report"]

PEER = "transformers"
TARGET_SYSTEM, TARGET_SPEEDUP = "leanserve 1 rank", 2.0
TARGET_CONTEXT_TOKENS, TARGET_BATCH = 16384, 1


class SystemFigures(msgspec.Struct, kw_only=True):
    """One system at one cell; None where it was not measured."""

    decode_step_ms: float | None = None
    """Median time in which every sequence of the batch got one token."""
    decode_steps: int | None = None
    decode_tokens_per_s: float | None = None
    """Of the whole batch."""
    first_token_s: float | None = None
    """From handing over the prompts to a prompt's first token: the mean over the batch, the median of the runs."""
    first_token_runs: int | None = None


class CellReport(msgspec.Struct, kw_only=True):
    """All systems at one cell."""

    cell: Cell
    decode_read_bytes: int
    """Weights and KV: what a decode step cannot do without reading."""
    decode_floor_ms: float
    """The time to read them at the machine's measured bandwidth."""
    systems: dict[str, SystemFigures]
    not_measured: dict[Quantity, str] = {}
    """Why."""

    def decode_speedup(self, system: str) -> float | None:
        """The peer's time per token over this system's."""
        return _ratio(self.systems[PEER].decode_step_ms, self.systems[system].decode_step_ms)

    def first_token_speedup(self, system: str) -> float | None:
        return _ratio(self.systems[PEER].first_token_s, self.systems[system].first_token_s)


class Target(msgspec.Struct, frozen=True):
    """What this project promises of itself, and what came of it."""

    promise: str
    dtype: str
    decode_speedup: float
    met: bool


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the figures depend on, beside machine and model."""

    threads: int
    """Of every system in all: ranks share them."""
    page_tokens: int
    max_batch_tokens: int
    """Prompt tokens that LeanServe computes in a step beside running streams."""
    max_prefill_step_tokens: int
    """The same while there are none, at most."""
    attn_implementation: str
    """The peer's."""
    decode_on: str
    """What the caches held."""
    read_bytes_per_s: float
    """Measured, with all threads: what the floors are reckoned with."""
    load_average_after: float


class EngineReport(msgspec.Struct, kw_only=True):
    """One run of `bench engine`."""

    benchmark: str
    machine: Machine
    settings: Settings
    model: ModelShape
    ended_early: str | None
    """Why figures at the end of the grid are missing; None: none are."""
    caveats: list[str]
    """What a reader must know before trusting the figures."""
    cells: list[CellReport]

    def targets(self) -> list[Target]:
        """One for each dtype that was measured at the promised cell."""
        found = []
        for report in self.cells:
            cell = report.cell
            if (cell.context_tokens, cell.batch) != (TARGET_CONTEXT_TOKENS, TARGET_BATCH):
                continue
            speedup = report.decode_speedup(TARGET_SYSTEM) if TARGET_SYSTEM in report.systems else None
            if speedup is not None:
                promise = f"{TARGET_SYSTEM} at least {TARGET_SPEEDUP:g}x faster per token than {PEER} at 16k, batch 1"
                found.append(Target(promise, cell.dtype, round(speedup, 3), speedup >= TARGET_SPEEDUP))
        return found

    def to_json(self) -> bytes:
        """Everything, with the ratios and targets reckoned out."""
        plain = msgspec.to_builtins(self)
        for report, cell in zip(self.cells, plain["cells"], strict=True):
            ours = [name for name in report.systems if name != PEER]
            cell["decode_speedup"] = {name: _rounded(report.decode_speedup(name)) for name in ours}
            cell["first_token_speedup"] = {name: _rounded(report.first_token_speedup(name)) for name in ours}
        plain["targets"] = msgspec.to_builtins(self.targets())
        return msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"


def write_report(report: EngineReport, folder: Path) -> None:
    """Write engine.json and engine.png into `folder`."""
    from leanserve.bench.plot import plot_report

    (folder / "engine.json").write_bytes(report.to_json())
    plot_report(report, folder / "engine.png")


def print_report(report: EngineReport, console: Console) -> None:
    """Two tables, what was left out and why, and the target."""
    machine, settings = report.machine, report.settings
    console.print(f"{machine.cpu}, {settings.threads} threads for each system", highlight=False)
    console.print(", ".join(f"{name} {version}" for name, version in machine.versions.items()), highlight=False)
    console.print(
        f"load {machine.load_average:.1f} before the run, {settings.load_average_after:.1f} after; memory is read at "
        f"{settings.read_bytes_per_s / 1e9:.0f} GB/s",
        highlight=False,
    )
    decode = _table("Decode, tokens/s of the batch", report, "limit")
    first_token = _table("Time to first token, s, mean over the batch", report)
    for cell in report.cells:
        place = (cell.cell.dtype, str(cell.cell.context_tokens), str(cell.cell.batch))
        decode.add_row(
            *place,
            *(_text(f.decode_tokens_per_s, 1, cell.decode_speedup(name)) for name, f in cell.systems.items()),
            f"{cell.cell.batch / cell.decode_floor_ms * 1e3:.1f}",
        )
        first_token.add_row(
            *place, *(_text(f.first_token_s, 2, cell.first_token_speedup(name)) for name, f in cell.systems.items())
        )
    console.print(decode)
    console.print("In brackets: times as fast as transformers. limit: weights and KV read once at full bandwidth.\n")
    console.print(first_token)
    reasons = {f"{quantity}: {why}" for cell in report.cells for quantity, why in cell.not_measured.items()}
    if report.ended_early is not None:
        console.print(f"[red]Ended early:[/] {report.ended_early}", highlight=False)
    for caveat in report.caveats:
        console.print(f"[yellow]Note:[/] {caveat}", highlight=False)
    for reason in sorted(reasons):
        console.print(f"- {reason}", highlight=False)
    for target in report.targets():
        word = "[green]met[/]" if target.met else "[red]missed[/]"
        console.print(f"Target, {target.dtype}: {target.promise}. Seen: {target.decode_speedup:.2f}x, {word}.")


def _table(title: str, report: EngineReport, *more: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("dtype")
    for heading in ("context", "batch", *report.cells[0].systems, *more):
        # "leanserve" over "1 rank", so that a table of two rank counts fits a terminal of 80 columns.
        table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    return table


def _text(value: float | None, digits: int, speedup: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if speedup in (None, 1.0) else f" ({speedup:.2f}x)")


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else theirs / ours


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 3)
