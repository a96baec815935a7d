"""The end of a run in a terminal: every figure with its formula."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from leanserve.loadtest.measures import FORMULAS, Distribution
from leanserve.loadtest.progress import duration, line_text
from leanserve.loadtest.report import Report
from leanserve.loadtest.sweep import Sweep

__all__ = ["LATENCIES", "facts_of", "print_report"]

LATENCIES = {
    "ttft_ms": "TTFT",
    "first_byte_ms": "first byte",
    "itl_ms": "ITL",
    "tpot_ms": "TPOT",
    "e2e_ms": "end to end",
    "client_delay_ms": "client delay",
}
_MAX_LISTED = 8


def print_report(report: Report, console: Console) -> None:
    """Print figures, formulas and warnings."""
    title, measures = report.title, report.measures
    counts = f"{measures.succeeded} of {measures.requests} requests succeeded"
    console.print(
        f"\n[bold]{escape(title.model)}[/] at {title.url}: {counts}; {escape(title.arrivals)}", highlight=False
    )
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for name in ("", "mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for field, name in LATENCIES.items():
        found: Distribution = getattr(measures, field)
        table.add_row(name, *_cells(found))
    table.add_row("client lag", *_cells(report.client_lag_ms))
    console.print(table)
    for field, name in (LATENCIES | {"client_lag_ms": "client lag"}).items():
        console.print(f"[dim] {name} = {FORMULAS[field]}[/]", highlight=False)
    console.print()
    facts = Table(box=None, padding=(0, 1), show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_column(style="dim", overflow="fold")
    for name, value, formula in facts_of(report):
        facts.add_row(name, escape(value), escape(formula))
    console.print(facts)
    if report.sweep is not None:
        _print_sweep(report.sweep, console)
    for difference in report.correctness.different[:_MAX_LISTED]:
        console.print(
            f"request {difference.request} ({difference.prompt_tokens:,} prompt tokens) differs from {difference.unit} "
            f"{difference.first}: under load {difference.under_load}, alone {difference.alone}",
            markup=False,
        )
    for warning in report.warnings:
        console.print(f"[yellow]! {escape(warning)}[/]", highlight=False)


def _cells(found: Distribution) -> list[str]:
    values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)
    return [duration(value) if found.count else "-" for value in values]


def facts_of(report: Report) -> list[tuple[str, str, str]]:
    """Name, value and formula of every figure that is no distribution of latencies."""
    measures = report.measures
    facts = [
        ("duration", f"{measures.duration_s:.2f} s", FORMULAS["duration_s"]),
        ("requests", f"{measures.requests_per_s:.3g}/s", FORMULAS["requests_per_s"]),
        (
            "goodput",
            f"{measures.goodput_rps:.3g}/s, {measures.slo_share:.1%} within SLO: {report.slo}"
            if report.slo != "none"
            else "give an SLO",
            FORMULAS["goodput_rps"],
        ),
        (
            "input",
            f"{measures.input_tokens_per_s:,.0f} tokens/s ({measures.input_tokens:,} tokens)",
            FORMULAS["input_tokens_per_s"],
        ),
        (
            "output",
            f"{measures.output_tokens_per_s:,.1f} tokens/s ({measures.output_tokens:,} tokens)",
            FORMULAS["output_tokens_per_s"],
        ),
        ("chunks", f"{measures.tokens_per_chunk:.3g} tokens each", FORMULAS["tokens_per_chunk"]),
    ]
    if measures.cached_tokens is not None:
        share = measures.cached_tokens / max(1, measures.input_tokens)
        facts.append(("cached", f"{measures.cached_tokens:,} prompt tokens ({share:.1%})", FORMULAS["cached_tokens"]))
    for name, line, what, rest in (
        ("prefill", measures.prefill, "1k prompt tokens", "queue"),
        ("decode", measures.decode, "1k of context", "base"),
    ):
        value = "not fitted: lengths differ too little"
        if line is not None:
            value = line_text(line.at_zero_ms, line.per_1k_tokens_ms, what)
            if line.at_zero_ms < 0:
                value += f"; no {rest} can be told: these lengths lie on a line that is below 0 at 0 tokens"
        facts.append((name, value, FORMULAS[name]))
    if (stall := measures.longest_stall) is not None:
        usual = f" (usual gap {duration(stall.typical_gap_ms)})" if stall.typical_gap_ms else ""
        where = f"request {stall.stream} at token {stall.token}, while request {stall.prefill} prefilled"
        value = f"{duration(stall.gap_ms)}{usual}: {where} {stall.prefill_tokens:,} tokens"
        facts.append(("longest stall", value, FORMULAS["longest_stall"]))
    facts.append(("client CPU", f"{report.client_cpu:.1%} of a core", FORMULAS["client_cpu"]))
    if measures.errors:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in measures.errors_by_kind.items())
        facts.append(("errors", kinds, "by kind"))
    if measures.cancelled or measures.slow_readers:
        facts.append(
            (
                "on purpose",
                f"{measures.cancelled} cancelled, {measures.slow_readers} read slowly",
                "in no latency above",
            )
        )
    return facts + _correctness_facts(report) + _server_facts(report)


def _correctness_facts(report: Report) -> list[tuple[str, str, str]]:
    found = report.correctness
    facts: list[tuple[str, str, str]] = []
    if found.needles_asked:
        facts.append(
            (
                "needles",
                f"{found.needles_found} of {found.needles_asked} right",
                "answers under load that contain the fact told in their document",
            )
        )
    if found.repeated or found.failed_alone:
        failed = f", {len(found.failed_alone)} failed" if found.failed_alone else ""
        facts.append(
            (
                "determinism",
                f"{found.equal} of {found.repeated} equal{failed}",
                "greedy answers under load = the same prompts alone, token by token",
            )
        )
    return facts


def _server_facts(report: Report) -> list[tuple[str, str, str]]:
    server = report.server
    if server is None:
        return [("server", "tells nothing of itself (no /metrics)", "")]
    facts: list[tuple[str, str, str]] = []
    if server.peak_running is not None:
        waiting = f", {server.peak_waiting:g} waited" if server.peak_waiting is not None else ""
        facts.append(
            ("server peak", f"{server.peak_running:g} ran{waiting}", f"most seen in {server.source}, each second")
        )
    if server.peak_kv_use is not None:
        facts.append(("KV use", f"{server.peak_kv_use:.1%}", "share of the KV memory, highest sample"))
    if server.peak_kv_per_rank:
        ranks = ", ".join(f"rank {rank}: {value:g}" for rank, value in server.peak_kv_per_rank.items())
        uneven = f"; imbalance {server.imbalance:.3f}" if server.imbalance is not None else ""
        facts.append(("KV per rank", f"{ranks}{uneven}", "fullest sample; imbalance: fullest rank / mean"))
    if server.preemptions:
        facts.append(("preemptions", f"{server.preemptions:g}", "after - before"))
    state = "idle, no page referenced" if server.idle_at_end else "NOT idle"
    facts.append(("server after", state, "running, waiting and referenced pages, within 5 s of the end"))
    return facts


def _print_sweep(sweep: Sweep, console: Console) -> None:
    table = Table(box=None, padding=(0, 1), header_style="bold", title=f"sweep over {sweep.kind}", title_justify="left")
    for name in (
        sweep.kind,
        "requests/s",
        "goodput/s",
        "within SLO",
        "output tokens/s",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
    ):
        table.add_column(name, justify="right")
    for step in sweep.steps:
        found = step.measures
        marks = " *" if step.load == sweep.best else ""
        table.add_row(
            f"{step.load:g}{marks}",
            f"{found.requests_per_s:.3g}",
            f"{found.goodput_rps:.3g}",
            f"{found.slo_share:.0%}",
            f"{found.output_tokens_per_s:,.1f}",
            duration(found.ttft_ms.p50),
            duration(found.ttft_ms.p99),
            duration(found.tpot_ms.p50),
        )
    console.print(table)
    best = (
        "no load meets the SLO" if sweep.best is None else f"* highest {sweep.kind} that meets the SLO: {sweep.best:g}"
    )
    console.print(f"{best}; knee (most tokens/s over latency): {sweep.knee:g}", highlight=False)
