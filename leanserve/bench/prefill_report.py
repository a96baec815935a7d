"""What `bench prefill` found, as JSON for programs, as tables and a picture for people."""

from importlib.util import find_spec
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leanserve.bench.host_cost import HostCost
from leanserve.bench.machine import Machine
from leanserve.bench.random_model import ModelShape
from leanserve.bench.task import Quantity
from leanserve.bench.waits import Waits

__all__ = ["Measured", "PrefillReport", "print_prefill_report", "write_prefill_report"]

_UNITS: dict[str, tuple[str, str]] = {
    "first token": ("prefill, tokens/s", "higher is better"),
    "decode": ("decode, ms a token", "lower is better"),
    "shared prefix": ("all of one prefix, s", "lower is better"),
    "unshared prefix": ("the same without the cache, s", "lower is better"),
}


class Measured(msgspec.Struct, kw_only=True):
    """One quantity at one length, of every system."""

    quantity: Quantity
    context_tokens: int
    batch: int
    seconds: dict[str, float] = {}
    """By system; one that is missing was not measured."""

    def figure(self, system: str) -> float | None:
        """In the unit that people compare: tokens/s of a prefill, ms of a decode step, seconds of the rest."""
        seconds = self.seconds.get(system)
        if seconds is None:
            return None
        if self.quantity == "first token":
            return self.batch * self.context_tokens / seconds
        return seconds * 1e3 if self.quantity == "decode" else seconds


class PrefillReport(msgspec.Struct, kw_only=True):
    """One run of `bench prefill`; None where it ended before."""

    benchmark: str
    machine: Machine
    threads: int
    """Of every system in all: ranks share them."""
    model: ModelShape
    """Of `measured`; `waits` is of the bundled model."""
    host_cost: HostCost | None = None
    waits: Waits | None = None
    measured: list[Measured] = []
    load_average_after: float | None = None
    ended_early: str | None = None
    caveats: list[str] = []
    """What a reader must know before trusting the figures."""

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(name for measured in self.measured for name in measured.seconds))

    def to_json(self) -> bytes:
        """Everything, with the figures in the units of the tables."""
        plain = msgspec.to_builtins(self, str_keys=True)
        for measured, row in zip(self.measured, plain["measured"], strict=True):
            row["unit"] = _UNITS[measured.quantity][0]
            row["figures"] = {name: round(measured.figure(name) or 0.0, 3) for name in measured.seconds}
        return msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"


def write_prefill_report(report: PrefillReport, folder: Path) -> None:
    """Write prefill.json into `folder`, and prefill.png where matplotlib is installed (it is in the `test` extra)."""
    (folder / "prefill.json").write_bytes(report.to_json())
    if find_spec("matplotlib") is not None and report.measured:
        _plot(report, folder / "prefill.png")


def print_prefill_report(report: PrefillReport, console: Console) -> None:
    machine = report.machine
    console.print(f"{machine.cpu}, {report.threads} threads for each system, float32", highlight=False)
    console.print(", ".join(f"{name} {version}" for name, version in machine.versions.items()), highlight=False)
    if report.waits is not None:
        waits = report.waits
        console.print(
            f"Beside a prefill of {waits.long_prompt_tokens} tokens (bundled model, chunks of {waits.chunk_s:.2f} s): "
            f"requests of {waits.short_prompt_tokens} tokens had their first token within "
            f"{waits.first_token_chunks:.2f} chunk times, and {waits.streams} streams no gap above "
            f"{waits.longest_gap_chunks:.2f}.",
            highlight=False,
        )
    if report.host_cost is not None:
        cost = report.host_cost
        for title, figures in (
            (f"a step of {cost.sequences} sequences", cost.step_ms),
            ("to admit a prompt", cost.admission_ms),
            ("to admit a cached prompt", cost.cached_admission_ms),
        ):
            figures_text = ", ".join(f"{ms:.2f} ms at {tokens} tokens" for tokens, ms in figures.items())
            console.print(f"On the host, {title}: {figures_text}", highlight=False)
    if report.measured:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("")
        for heading in ("context", "batch", *report.systems):
            table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
        for measured in report.measured:
            figures = [measured.figure(name) for name in report.systems]
            table.add_row(
                _UNITS[measured.quantity][0],
                str(measured.context_tokens),
                str(measured.batch),
                *("-" if figure is None else f"{figure:,.1f}" for figure in figures),
            )
        console.print(table)
    if report.ended_early is not None:
        console.print(f"[red]Ended early:[/] {report.ended_early}", highlight=False)
    for caveat in report.caveats:
        console.print(f"[yellow]Note:[/] {caveat}", highlight=False)


def _plot(report: PrefillReport, path: Path) -> None:
    """A panel for each quantity, a bar for each system."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    quantities = list(dict.fromkeys(measured.quantity for measured in report.measured))
    figure = Figure(figsize=(4.2 * len(quantities), 4.2), layout="constrained")
    width = 0.8 / len(report.systems)
    for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        rows = [measured for measured in report.measured if measured.quantity == quantity]
        for index, name in enumerate(report.systems):
            places = [place - 0.4 + (index + 0.5) * width for place in range(len(rows))]
            bars = axes.bar(places, [row.figure(name) or 0.0 for row in rows], width, label=name)
            axes.bar_label(bars, fmt=_bar_text, fontsize="x-small", rotation=60)
        axes.set_xticks(range(len(rows)), [f"{row.context_tokens:,}\nbatch {row.batch}" for row in rows])
        axes.set_title(" (".join(_UNITS[quantity]) + ")", fontsize="medium")
        axes.margins(y=0.15)
        axes.grid(axis="y", alpha=0.3)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"{report.machine.cpu}, {report.threads} threads; {report.machine.date}", fontsize="medium")
    figure.savefig(path, dpi=120)


def _bar_text(value: float) -> str:
    """Nothing where a system was not measured."""
    if value == 0:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
