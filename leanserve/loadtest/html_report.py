"""report.html: one page that holds all it needs, and asks the network for nothing."""

import io
import re
from collections.abc import Sequence
from html import escape

import matplotlib
from matplotlib.figure import Figure

from leanserve.loadtest.measures import FORMULAS, Distribution
from leanserve.loadtest.plots import STYLE, Plot
from leanserve.loadtest.progress import duration
from leanserve.loadtest.record import Record
from leanserve.loadtest.report import Report
from leanserve.loadtest.tables import LATENCIES, facts_of

__all__ = ["html_page"]

_CSS = """
:root { --ink: #1b2230; --muted: #6b7486; --line: #e6e9ef; --blue: #2f6fed; --good: #0f8a75; --bad: #c9323e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 36px 24px 64px; }
header p { margin: 2px 0; color: var(--muted); }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 2px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 20px 24px; margin-top: 18px; }
section > p { margin: 0 0 12px; color: var(--muted); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 20px; }
.card { flex: 1 1 205px; background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; }
.card b { display: block; font-size: 23px; font-weight: 650; letter-spacing: -.01em; }
.card span { color: var(--muted); font-size: 13px; }
.card.good b { color: var(--good); } .card.bad b { color: var(--bad); }
.warnings { border-color: #f3cf9b; background: #fffaf2; }
.warnings ul { margin: 6px 0 0; padding-left: 20px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 9px; border-bottom: 1px solid var(--line); vertical-align: baseline; }
.numbers td:not(.formula) { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child, .left { text-align: left; }
td:first-child { font-weight: 550; white-space: nowrap; }
.formula { color: var(--muted); font-size: 13px; text-align: left; }
.scroll { overflow-x: auto; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 13px; margin-top: 20px; }
"""
_MAX_LISTED = 50


def html_page(report: Report, records: Sequence[Record], plots: Sequence[Plot]) -> str:
    """The page as text."""
    title = report.title
    name = escape(title.model)
    limit = f", context up to {title.limit_tokens:,} tokens" if title.limit_tokens else ""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load test of {name}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_CSS}</style></head><body><main>",
        f"<header><h1>{name}</h1><p>{escape(title.url)}{limit}</p>",
        f"<p>{escape(title.arrivals)}, {report.measures.requests} requests, {escape(title.date)}</p></header>",
        _cards(report),
        _warnings(report),
        _latencies(report),
        *(_plot(plot) for plot in plots),
        _facts(report),
        _answers(report, records),
        _errors(records),
        _settings(report),
        f"<footer>leanserve loadtest {escape(title.version)}. Percentiles interpolate linearly.</footer>",
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _cards(report: Report) -> str:
    measures, correctness = report.measures, report.correctness
    slo = "" if report.slo == "none" else f"{measures.slo_share:.0%} within SLO"
    failed = f"{measures.errors} failed" if measures.errors else "none failed"
    ended = f"{measures.succeeded} of {measures.requests}"
    cards = [
        ("bad" if measures.errors else "", ended, f"requests succeeded, {failed}"),
        ("", duration(measures.ttft_ms.p50), f"to first token, median; p99 {duration(measures.ttft_ms.p99)}"),
        ("", duration(measures.tpot_ms.p50), f"per output token, median; p99 {duration(measures.tpot_ms.p99)}"),
        ("", f"{measures.output_tokens_per_s:,.3g}/s", f"output tokens; {measures.input_tokens_per_s:,.0f}/s input"),
        ("", f"{measures.goodput_rps:.3g}/s", f"goodput, {slo}")
        if slo
        else ("", f"{measures.requests_per_s:.3g}/s", "requests; --slo makes it goodput"),
    ]
    if (stall := measures.longest_stall) is not None:
        cards.append(("", duration(stall.gap_ms), "longest stall of a stream behind another's prefill"))
    if correctness.needles_asked:
        share = correctness.needles_found / correctness.needles_asked
        kind = "good" if share >= 0.95 else "bad"
        cards.append((kind, f"{correctness.needles_found} of {correctness.needles_asked}", "needles found under load"))
    if correctness.repeated:
        kind = "bad" if correctness.different else "good"
        cards.append((kind, f"{correctness.equal} of {correctness.repeated}", "answers equal to the same alone"))
    inside = "".join(
        f'<div class="card {kind}"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for kind, value, text in cards
    )
    return f'<div class="cards">{inside}</div>'


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    return f'<section class="warnings"><h2>Before you read on</h2><ul>{items}</ul></section>'


def _latencies(report: Report) -> str:
    rows = [
        _latency_row(name, getattr(report.measures, field), FORMULAS[field])
        for field, name in (LATENCIES | {"connect_ms": "connect"}).items()
    ]
    rows.append(_latency_row("client lag", report.client_lag_ms, FORMULAS["client_lag_ms"]))
    heads = "".join(f"<th>{name}</th>" for name in ("", "mean", "p50", "p90", "p95", "p99", "max"))
    return (
        "<section><h2>Latency</h2><p>Of successful requests, unless said otherwise; what each figure is stands beside "
        "it.</p>"
        f'<div class="scroll"><table class="numbers"><tr>{heads}<th class="left">formula</th></tr>'
        f"{''.join(rows)}</table></div></section>"
    )


def _latency_row(name: str, found: Distribution, formula: str) -> str:
    values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)
    cells = "".join(f"<td>{duration(value) if found.count else '&ndash;'}</td>" for value in values)
    return f'<tr><td>{name}</td>{cells}<td class="formula">{escape(formula)}</td></tr>'


def _plot(plot: Plot) -> str:
    name, title, caption, figure = plot
    return f"<section><h2>{escape(title)}</h2><p>{escape(caption)}</p>{_svg(figure, name, title)}</section>"


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an element of the page. Its ids are salted by name: those of two plots must not meet."""
    written = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    inside = text[text.index("<svg") :]
    # Groups are numbered alike in every figure, and nothing refers to them.
    inside = re.sub(r'<g id="[a-z]+[\w.]*"', "<g", inside)
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL)
    return inside.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _facts(report: Report) -> str:
    rows = "".join(
        f'<tr><td>{name}</td><td class="left">{escape(value)}</td><td class="formula">{escape(formula)}</td></tr>'
        for name, value, formula in facts_of(report)
    )
    return f"<section><h2>Figures</h2><table>{rows}</table></section>"


def _answers(report: Report, records: Sequence[Record]) -> str:
    found = report.correctness
    by_index = {record.index: record for record in records}
    rows = [
        f'<tr><td>{index}</td><td>{by_index[index].context_tokens:,}</td><td class="left">fact missed</td>'
        f'<td class="left"><code>{escape(by_index[index].needle or "")}</code></td>'
        f'<td class="left"><code>{escape(by_index[index].text.strip()[:120])}</code></td></tr>'
        for index in found.needles_missed[:_MAX_LISTED]
    ]
    rows += [
        f'<tr><td>{one.request}</td><td>{one.prompt_tokens:,}</td><td class="left">differs from {one.unit} {one.first}'
        f'</td><td class="left"><code>{escape(one.alone)}</code></td>'
        f'<td class="left"><code>{escape(one.under_load)}</code></td></tr>'
        for one in found.different[:_MAX_LISTED]
    ]
    if not rows:
        return ""
    heads = '<th>request</th><th>prompt tokens</th><th class="left">what</th><th class="left">expected, or alone</th>'
    return (
        f'<section><h2>Answers that are not right</h2><div class="scroll"><table><tr>{heads}'
        f'<th class="left">under load</th></tr>{"".join(rows)}</table></div></section>'
    )


def _errors(records: Sequence[Record]) -> str:
    failed = [record for record in records if record.outcome == "error"]
    if not failed:
        return ""
    rows = "".join(
        f'<tr><td>{record.index}</td><td class="left">{escape(record.error_kind or "")}</td>'
        f'<td class="left"><code>{escape((record.error or "")[:300])}</code></td></tr>'
        for record in failed[:_MAX_LISTED]
    )
    return (
        f"<section><h2>Errors</h2><p>{len(failed)} in all; each in requests.jsonl.</p><table>{rows}</table></section>"
    )


def _settings(report: Report) -> str:
    given = {name: value for name, value in report.title.settings.items() if value is not None}
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="left"><code>{escape(str(value))}</code></td></tr>'
        for name, value in given.items()
    )
    return f"<section><h2>Settings</h2><table>{rows}</table></section>"
