"""The plots of a report, each as a matplotlib figure. Fonts and colours are the page's own."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from leanserve.loadtest.progress import line_text
from leanserve.loadtest.record import Record
from leanserve.loadtest.report import Report
from leanserve.loadtest.scrape import ServerSamples
from leanserve.loadtest.slo import tpot_ms
from leanserve.loadtest.sweep import Sweep

__all__ = ["BLUE", "MUTED", "ORANGE", "STYLE", "TEAL", "Plot", "plots_of"]

INK, MUTED, GRID = "#1b2230", "#6b7486", "#e6e9ef"
BLUE, ORANGE, TEAL, RED, PALE = "#2f6fed", "#f08c2e", "#14a38b", "#d64550", "#b9cdf8"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
_MAX_BARS = 400

Plot = tuple[str, str, str, Figure]
"""File name without its ending, title, caption, figure."""


def plots_of(report: Report, records: Sequence[Record], samples: ServerSamples) -> list[Plot]:
    """Every plot that the run has data for."""
    with matplotlib.rc_context(STYLE):
        drawn: list[Plot | None] = [
            _sweep(report.sweep) if report.sweep is not None else None,
            _timeline(records),
            _ttft(report, records),
            _decode(report),
            _cdfs(records),
            _server(samples),
        ]
    return [plot for plot in drawn if plot is not None]


def _new(height: float, columns: int = 1, width: float = 9.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def _seconds(value_ms: float, _: object = None) -> str:
    return f"{value_ms / 1000:g} s" if value_ms >= 1000 else f"{value_ms:g} ms"


def _tokens(value: float, _: object = None) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 512 == 0 else f"{value:,.0f}"


def _time_axis(axis: Any, values_ms: Sequence[float], *, log: bool) -> None:
    if log:
        axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if max(values_ms) < 200 * min(values_ms) else (1.0,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(_seconds))


def _token_ticks(axes: Axes, lengths: Sequence[int]) -> None:
    """Ticks at powers of two on a logarithmic axis."""
    axes.set_xscale("log", base=2)
    low, high = np.floor(np.log2(min(lengths))), np.ceil(np.log2(max(lengths)))
    axes.set_xticks(2.0 ** np.arange(low, high + 1))
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _timeline(records: Sequence[Record]) -> Plot | None:
    timed = sorted((r for r in records if r.first_byte_ms is not None), key=lambda r: (r.intended_s, r.index))
    if not timed:
        return None
    shown = timed[:_MAX_BARS]
    figure, (axes,) = _new(min(7.0, 1.6 + 0.11 * len(shown)))
    for row, record in enumerate(shown):
        begin, first_s = record.intended_s, (record.ttft_ms or 0) / 1000
        end_s = max((record.last_token_ms or 0) / 1000, record.end_s - begin)
        colour = {"ok": BLUE, "slow": TEAL, "cancelled": MUTED, "error": RED}[record.outcome]
        axes.barh(row, first_s or end_s, left=begin, height=0.8, color=PALE if first_s else colour)
        if first_s:
            axes.barh(row, end_s - first_s, left=begin + first_s, height=0.8, color=colour)
    for name, colour in (("waiting and prefill", PALE), ("decode", BLUE)):
        axes.bar(0, 0, color=colour, label=name)
    others = {"slow": ("read slowly", TEAL), "cancelled": ("cancelled", MUTED), "error": ("failed", RED)}
    for outcome in sorted({record.outcome for record in shown} - {"ok"}):
        axes.bar(0, 0, color=others[outcome][1], label=others[outcome][0])
    axes.set(xlabel="seconds from the start", ylabel="request", ylim=(len(shown) - 0.4, -0.6), yticks=[])
    axes.set_xlim(0, max(record.end_s for record in shown) * 1.01)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.35 / figure.get_figheight()), ncols=5)
    cut = f" The first {_MAX_BARS} of {len(timed)}." if len(timed) > _MAX_BARS else ""
    return "timeline", "Timeline", f"One line a request, in order of its intended start.{cut}", figure


def _ttft(report: Report, records: Sequence[Record]) -> Plot | None:
    good = [r for r in records if r.outcome == "ok" and r.ttft_ms is not None]
    if not good:
        return None
    tokens, ttft_ms = [r.context_tokens for r in good], [r.ttft_ms or 0.0 for r in good]
    figure, (axes,) = _new(3.4)
    axes.scatter(tokens, ttft_ms, s=26, color=BLUE, alpha=0.7, linewidths=0, label="one request")
    if max(tokens) > 3 * min(tokens):
        _token_ticks(axes, tokens)
    if max(ttft_ms) > 10 * min(ttft_ms) > 0:
        axes.set_yscale("log")
        _time_axis(axes.yaxis, ttft_ms, log=True)
    else:
        axes.set_ylim(bottom=0)
        _time_axis(axes.yaxis, ttft_ms, log=False)
    if (line := report.measures.prefill) is not None:
        x = np.geomspace(min(tokens), max(tokens), 100)
        y = line.at_zero_ms + line.per_1k_tokens_ms * x / 1000
        axes.plot(
            x[y > 0], y[y > 0], color=ORANGE, label=line_text(line.at_zero_ms, line.per_1k_tokens_ms, "1k tokens")
        )
    axes.set(xlabel="prompt tokens", ylabel="time to first token")
    axes.legend(loc="upper left")
    return "ttft", "Time to first token", "From the intended start, against the prompt's length.", figure


def _decode(report: Report) -> Plot | None:
    bins = report.measures.decode_by_position
    if not bins:
        return None
    middle = [found.position for found in bins]
    figure, (axes,) = _new(3.4)
    low, high = [found.p10_ms for found in bins], [found.p90_ms for found in bins]
    axes.vlines(middle, low, high, color=PALE, linewidth=4, label="p10 to p90")
    axes.plot(middle, [found.p50_ms for found in bins], "o", color=BLUE, markersize=5, label="median")
    if (line := report.measures.decode) is not None:
        x = np.array([middle[0], middle[-1]])
        label = line_text(line.at_zero_ms, line.per_1k_tokens_ms, "1k of context")
        axes.plot(x, line.at_zero_ms + line.per_1k_tokens_ms * x / 1000, color=ORANGE, label=label)
    axes.set(xlabel="tokens in the context", ylabel="time per token")
    typical = float(np.median([found.p50_ms for found in bins]))
    if min(low) > 0 and max(high) > 10 * typical:  # prefills of others stretch some gaps by far
        axes.set_yscale("log")
        axes.set_ylim(top=3 * max(high))
    else:
        axes.set_ylim(0, 1.2 * max(high) or 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(_seconds))
    axes.legend(loc="upper left", ncols=3)
    return "decode", "Time per token over the context", "Gaps between tokens, by how much context they read.", figure


def _cdfs(records: Sequence[Record]) -> Plot | None:
    good = [r for r in records if r.outcome == "ok"]
    values: dict[str, list[float]] = {
        "TTFT": [r.ttft_ms for r in good if r.ttft_ms is not None],
        "ITL": [float(gap) for r in good for gap in np.diff(r.chunk_ms)],
        "TPOT": [found for r in good if (found := tpot_ms(r)) is not None],
        "end to end": [r.e2e_ms for r in good if r.e2e_ms is not None],
    }
    values = {name: sample for name, sample in values.items() if sample}
    if not values:
        return None
    figure, all_axes = _new(2.7, len(values))
    for axes, (name, sample), colour in zip(all_axes, values.items(), (BLUE, TEAL, ORANGE, INK), strict=False):
        axes.ecdf(sample, color=colour, linewidth=1.8)
        for percent in (50, 99):
            at = float(np.percentile(sample, percent))
            axes.plot(at, percent / 100, "o", color=colour, markersize=4)
            text = f"p{percent} {_seconds(float(f'{at:.3g}'))}"
            axes.annotate(text, (at, percent / 100), (-5, 5), textcoords="offset points", ha="right", fontsize=8)
        positive = max(1e-3, min(sample))
        if max(sample) > 20 * positive:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(10))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(0, max(sample) * 1.05 or 1)
            axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(FuncFormatter(_seconds))
        axes.set(title=name, ylim=(0, 1.08))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}" if value <= 1 else ""))
    return "latencies", "Latencies", "Share of requests (ITL: of gaps) that took at most so long.", figure


def _server(samples: ServerSamples) -> Plot | None:
    taken = samples.samples
    if not any(sample.kv_per_rank or sample.running for sample in taken):
        return None
    figure, (load, memory) = _new(2.9, 2)
    at_s = [sample.at_s for sample in taken]
    for name, colour in (("running", BLUE), ("waiting", ORANGE)):
        load.step(at_s, [getattr(s, name) or 0 for s in taken], where="post", color=colour, label=name)
    load.set(xlabel="seconds from the start", title="requests")
    load.legend(loc="upper right", ncols=2)
    ranks = sorted({rank for sample in taken for rank in sample.kv_per_rank or {}}, key=lambda rank: (len(rank), rank))
    for place, rank in enumerate(ranks):
        colour = (BLUE, ORANGE, TEAL, RED, INK, MUTED)[place % 6]
        held = [(s.kv_per_rank or {}).get(rank, 0) for s in taken]
        dashes = "--" if place % 2 else "-"  # equal shares lie on each other
        memory.step(at_s, held, dashes, where="post", color=colour, label=f"rank {rank}")
    if ranks:
        memory.legend(loc="upper right", ncols=4)
        memory.set(xlabel="seconds from the start", title="KV use by rank")
    else:
        memory.step(at_s, [sample.kv_use or 0 for sample in taken], where="post", color=BLUE)
        memory.set(xlabel="seconds from the start", title="KV use")
    for axes in (load, memory):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.2)
    return "server", "The server's own account", f"Sampled each second from {samples.source}.", figure


def _sweep(sweep: Sweep) -> Plot:
    figure, (rates, latencies) = _new(3.4, 2)
    loads = [step.load for step in sweep.steps]
    series: tuple[tuple[Axes, str, str, Callable[[Any], float]], ...] = (
        (rates, "goodput", TEAL, lambda found: found.goodput_rps),
        (rates, "all that succeeded", BLUE, lambda found: found.requests_per_s),
        (latencies, "TTFT p99", ORANGE, lambda found: found.ttft_ms.p99),
        (latencies, "TTFT p50", BLUE, lambda found: found.ttft_ms.p50),
        (latencies, "TPOT p50", TEAL, lambda found: found.tpot_ms.p50),
    )
    for axes, name, colour, value in series:
        dashes = "--" if name == "all that succeeded" else "-"
        axes.plot(loads, [value(step.measures) for step in sweep.steps], dashes, marker="o", color=colour, label=name)
    for axes in (rates, latencies):
        axes.axvline(sweep.knee, color=MUTED, linestyle=":", label=f"knee {sweep.knee:g}")
        if sweep.best is not None:
            axes.axvline(sweep.best, color=TEAL, linestyle=":", label=f"meets the SLO to {sweep.best:g}")
        axes.set(xlabel="requests/s asked" if sweep.kind == "rate" else "requests at once")
        axes.legend(fontsize=8)
    rates.set(title="requests/s", ylim=(0, None))
    latencies.set(title="latency", yscale="log")
    latencies.yaxis.set_major_formatter(FuncFormatter(_seconds))
    latencies.yaxis.set_minor_formatter(NullFormatter())
    return "sweep", f"Sweep over {sweep.kind}", "Each point is a run of its own, with prompts of its own.", figure
