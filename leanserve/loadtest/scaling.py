"""The same load on servers of 1, 2, 4 ... ranks: what another rank brings. Starts and ends `leanserve serve` itself."""

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import orjson
from rich.console import Console
from rich.table import Table

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.arrivals import ClosedLoop
from leanserve.loadtest.http_stream import Address, TransportError, fetch
from leanserve.loadtest.measures import Measures
from leanserve.loadtest.progress import Display, duration
from leanserve.loadtest.report import summary_of
from leanserve.loadtest.session import LoadTest, run_test
from leanserve.loadtest.workload import WorkloadOptions

__all__ = ["ScalingPlan", "ScalingResult", "print_scaling", "run_scaling", "speed_up", "write_scaling"]

READY_S = 900.0
"""A large model loads for minutes."""
_STOP_S = 60.0

SPEEDS: dict[str, Callable[[Measures], float]] = {
    "output tokens/s": lambda found: found.output_tokens_per_s,
    "prefill (1 / TTFT p50)": lambda found: 1000 / found.ttft_ms.p50 if found.ttft_ms.p50 else 0.0,
    "decode (1 / TPOT p50)": lambda found: 1000 / found.tpot_ms.p50 if found.tpot_ms.p50 else 0.0,
}
"""What is compared between rank counts; more is better."""


@dataclass(frozen=True)
class ScalingPlan:
    """What to start, and what to ask it."""

    ranks: tuple[int, ...]
    model: str | None
    serve_options: str
    """More arguments of `leanserve serve`, as a shell writes them."""
    workload: WorkloadOptions
    arrivals: ClosedLoop


class ScalingResult(msgspec.Struct, kw_only=True):
    """Measures by rank count, in rising order."""

    model: str
    load: str
    by_ranks: dict[int, Measures]
    summaries: dict[int, dict[str, Any]]
    """summary.json of each run."""


def run_scaling(plan: ScalingPlan, display: Display) -> ScalingResult:
    """Run the plan, one server after the other.

    Raises:
        ConfigError: a server does not start, with the end of what it printed.
    """
    result = ScalingResult(model=plan.model or "bundled", load=plan.arrivals.describe(), by_ranks={}, summaries={})
    for ranks in plan.ranks:
        display.stage(f"starting leanserve serve --ranks {ranks}")
        with _served(plan, ranks) as url:
            test = LoadTest(
                url=url, workload=plan.workload, arrivals=plan.arrivals, repeat=0, settings={"ranks": ranks}
            )
            finished = asyncio.run(run_test(test, display))
        if not finished.report.measures.succeeded:
            raise ConfigError(f"with --ranks {ranks} no request succeeded: {finished.report.measures.errors_by_kind}")
        result.by_ranks[ranks] = finished.report.measures
        result.summaries[ranks] = summary_of(finished.report)
    return result


def speed_up(result: ScalingResult, speed: Callable[[Measures], float]) -> dict[int, float]:
    """Speed at each rank count over that at the smallest."""
    first = speed(next(iter(result.by_ranks.values())))
    return {ranks: speed(found) / first if first else 0.0 for ranks, found in result.by_ranks.items()}


@contextlib.contextmanager
def _served(plan: ScalingPlan, ranks: int) -> Iterator[str]:
    """A server of so many ranks, ready; ended afterwards with everything it started. Yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "leanserve", "serve", *([plan.model] if plan.model else [])]
    command += ["--ranks", str(ranks), "--port", str(port), *shlex.split(plan.serve_options)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "200"})
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(server, url, lambda: _tail(log))
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_ready(server: "subprocess.Popen[bytes]", url: str, printed: Callable[[], str]) -> None:
    address = Address.parse(url)
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ConfigError(f"`{shlex.join(server.args)}` ended with code {server.returncode}:\n{printed()}")  # pyright: ignore[reportArgumentType, reportCallIssue]
        with contextlib.suppress(TransportError):
            if asyncio.run(fetch(address, "GET", "/ready", timeout_s=5))[0] == 200:
                return
        time.sleep(0.2)
    raise ConfigError(f"the server was not ready within {READY_S:g} s; it printed:\n{printed()}")


def _tail(log: Any) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-12:])


def print_scaling(result: ScalingResult, console: Console) -> None:
    """A line per rank count, with speed-up and efficiency (speed-up over the ranks it took)."""
    table = Table(
        box=None, padding=(0, 1), header_style="bold", title=f"{result.model}, {result.load}", title_justify="left"
    )
    for name in ("ranks", "tokens/s", "TTFT p50", "TPOT p50", "speed-up", "efficiency", "prefill", "decode"):
        table.add_column(name, justify="right")
    ups = [speed_up(result, speed) for speed in SPEEDS.values()]
    fewest = min(result.by_ranks)
    for ranks, found in result.by_ranks.items():
        table.add_row(
            str(ranks),
            f"{found.output_tokens_per_s:,.1f}",
            duration(found.ttft_ms.p50),
            duration(found.tpot_ms.p50),
            f"{ups[0][ranks]:.2f}",
            f"{ups[0][ranks] * fewest / ranks:.0%}",
            f"{ups[1][ranks]:.2f}",
            f"{ups[2][ranks]:.2f}",
        )
    console.print(table)
    console.print(
        f"[dim]speed-up = output tokens/s / those of --ranks {fewest}; efficiency = speed-up x {fewest} / ranks; "
        "prefill and decode: the same of 1 / TTFT p50 and 1 / TPOT p50[/]",
        highlight=False,
    )


def write_scaling(result: ScalingResult, directory: Path) -> None:
    """scaling.json with every run's summary, and scaling.png."""
    from leanserve.loadtest.scaling_plot import plot_scaling

    content = {
        "model": result.model,
        "speed_up": {
            name: {str(ranks): up for ranks, up in speed_up(result, speed).items()} for name, speed in SPEEDS.items()
        },
        "runs": {str(ranks): summary for ranks, summary in result.summaries.items()},
    }
    (directory / "scaling.json").write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    plot_scaling({name: speed_up(result, speed) for name, speed in SPEEDS.items()}, directory / "scaling.png")
