"""Two runs side by side."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from leanserve.loadtest.progress import duration

__all__ = ["print_comparison"]

_LATENCIES = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
_STATISTICS = ("mean", "p50", "p90", "p99")
_HIGHER_IS_BETTER = ("goodput_rps", "requests_per_s", "input_tokens_per_s", "output_tokens_per_s")
_NOTABLE = 0.05
"""Changes of at least this share are coloured; runs of one machine differ by less by themselves."""
_NO_MATTER = {"url", "out", "model"}
"""Settings that two comparable runs may differ in."""


def print_comparison(before: dict[str, Any], after: dict[str, Any], console: Console) -> None:
    """Print every latency and rate of both, the change, and what makes the runs hard to compare."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("")
    for name in ("A", "B", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for field in _LATENCIES:
        for statistic in _STATISTICS:
            a, b = (float(run[field][statistic]) for run in (before, after))
            table.add_row(
                f"{field.removesuffix('_ms')} {statistic}", duration(a), duration(b), _change(a, b, rises=False)
            )
    for field in _HIGHER_IS_BETTER:
        a, b = float(before[field]), float(after[field])
        table.add_row(
            field.replace("_per_s", "/s").replace("_rps", "/s"), f"{a:,.4g}", f"{b:,.4g}", _change(a, b, rises=True)
        )
    for field in ("requests", "errors"):
        table.add_row(field, str(before[field]), str(after[field]), "")
    console.print(table)
    for name, run in (("A", before), ("B", after)):
        title = run["title"]
        console.print(f"[dim]{name}: {escape(title['model'])} at {title['url']}, {title['date']}[/]", highlight=False)
    for name, a, b in _different_settings(before["settings"], after["settings"]):
        console.print(
            f"[yellow]! settings differ: {name} is {escape(str(a))} in A and {escape(str(b))} in B[/]", highlight=False
        )


def _change(before: float, after: float, *, rises: bool) -> str:
    """The change in percent; green where it is for the better."""
    if not before:
        return ""
    share = after / before - 1
    text = f"{share:+.1%}"
    if abs(share) < _NOTABLE:
        return text
    return f"[{'green' if (share > 0) == rises else 'red'}]{text}[/]"


def _different_settings(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = [name for name in before | after if name not in _NO_MATTER]
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]
