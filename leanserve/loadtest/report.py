"""A finished run as one value: what summary.json holds, and what every other output is made from."""

from pathlib import Path
from typing import Any

import msgspec
import orjson

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.correctness import Correctness
from leanserve.loadtest.measures import FORMULAS, Distribution, Measures
from leanserve.loadtest.server_view import ServerView
from leanserve.loadtest.sweep import Sweep

__all__ = ["Report", "Title", "read_summary", "summary_of"]


class Title(msgspec.Struct, kw_only=True):
    """What was tested, how, and when."""

    url: str
    model: str
    limit_tokens: int | None
    arrivals: str
    version: str
    """Of LeanServe, the client."""
    date: str
    """UTC, ISO 8601."""
    settings: dict[str, Any]
    """Every option of the command line."""


class Report(msgspec.Struct, kw_only=True):
    """Everything a run found out, but for the single requests."""

    title: Title
    measures: Measures
    client_lag_ms: Distribution
    client_cpu: float
    server: ServerView | None
    correctness: Correctness
    slo: str
    warnings: list[str]
    sweep: Sweep | None = None
    """All loads; the figures above are then of the highest that meets the SLO, or of the lowest if none does."""


def summary_of(report: Report) -> dict[str, Any]:
    """summary.json: figures at the top level, so that programs find them."""
    top = msgspec.to_builtins(report)
    measures = top.pop("measures")
    return measures | top | {"settings": top["title"].pop("settings"), "formulas": FORMULAS}


def read_summary(path: Path) -> dict[str, Any]:
    """A summary.json, or the directory that holds one.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    file = path / "summary.json" if path.is_dir() else path
    try:
        summary = orjson.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(summary, dict) or not {"ttft_ms", "e2e_ms", "duration_s"} <= summary.keys():
        raise ConfigError(f"{file} is no summary of a load test; give the summary.json of --out DIR, or that directory")
    return summary
