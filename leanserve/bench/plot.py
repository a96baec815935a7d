"""The report of `bench engine` as a picture."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leanserve.bench.report import CellReport, EngineReport

__all__ = ["plot_report"]

matplotlib.use("Agg")


def plot_report(report: EngineReport, path: Path) -> None:
    """Write a PNG: per dtype, the time of a decode step and the time to first token, on log scales; lower is better."""
    dtypes = list(dict.fromkeys(cell.cell.dtype for cell in report.cells))
    figure = Figure(figsize=(13, 4.2 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), 2, squeeze=False)
    for (decode, first_token), dtype in zip(axes, dtypes, strict=True):
        cells = [cell for cell in report.cells if cell.cell.dtype == dtype]
        _bars(decode, cells, "decode_step_ms")
        for place, cell in enumerate(cells):
            decode.hlines(
                cell.decode_floor_ms, place - 0.4, place + 0.4, color="black", label="memory bandwidth's limit"
            )
        decode.set_title(f"{dtype}: decode, ms a step (lower is better)")
        _bars(first_token, cells, "first_token_s")
        first_token.set_title(f"{dtype}: time to first token, s (lower is better)")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, lines, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique))
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    figure.suptitle(f"{machine.cpu}, {report.settings.threads} threads; {versions}; {machine.date}", fontsize="medium")
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, cells: list[CellReport], field: str) -> None:
    names = list(cells[0].systems)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place - 0.4 + (index + 0.5) * width for place in range(len(cells))]
        heights = [getattr(cell.systems[name], field) or float("nan") for cell in cells]
        axes.bar(places, heights, width, label=name)
    axes.set_yscale("log")
    axes.set_xticks(
        range(len(cells)), [f"{c.cell.context_tokens:,}\nbatch {c.cell.batch}" for c in cells], fontsize="small"
    )
    axes.grid(axis="y", alpha=0.3)
