"""What --out DIR holds: summary.json, requests.jsonl, report.html, and each plot as a PNG."""

from pathlib import Path

import msgspec
import orjson

from leanserve.loadtest.html_report import html_page
from leanserve.loadtest.plots import plots_of
from leanserve.loadtest.report import summary_of
from leanserve.loadtest.session import Finished

__all__ = ["write_output"]

_PNG_DPI = 140


def write_output(finished: Finished, directory: Path) -> None:
    """Write everything into an existing directory, over an earlier run's files."""
    report, records = finished.report, finished.records
    (directory / "summary.json").write_bytes(orjson.dumps(summary_of(report), option=orjson.OPT_INDENT_2) + b"\n")
    with (directory / "requests.jsonl").open("wb") as lines:
        for record in records:
            lines.write(msgspec.json.encode(record) + b"\n")
    plots = plots_of(report, records, finished.samples)
    for name, _, _, figure in plots:
        figure.savefig(directory / f"{name}.png", dpi=_PNG_DPI)
    (directory / "report.html").write_text(html_page(report, records, plots), encoding="utf-8")
