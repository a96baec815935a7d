"""A whole test: find the server, write the workload, warm up, run, check the answers, sum up."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leanserve import __version__
from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.arrivals import ClosedLoop, OpenLoop
from leanserve.loadtest.correctness import Correctness, check_correctness
from leanserve.loadtest.guard import warnings_of
from leanserve.loadtest.http_stream import Address
from leanserve.loadtest.measures import distribution, measure
from leanserve.loadtest.progress import Display
from leanserve.loadtest.prompts import ids_prompt, text_prompt
from leanserve.loadtest.record import Record
from leanserve.loadtest.report import Report, Title
from leanserve.loadtest.runner import Live, RunResult, run_workload
from leanserve.loadtest.scrape import ServerSamples
from leanserve.loadtest.server_view import view_server
from leanserve.loadtest.slo import Slo
from leanserve.loadtest.sweep import LoadKind, sweep_of
from leanserve.loadtest.target import Endpoint, Target, find_target
from leanserve.loadtest.trace import read_trace
from leanserve.loadtest.workload import Workload, WorkloadOptions, write_workload

__all__ = ["Finished", "LoadTest", "run_test"]


@dataclass(frozen=True, kw_only=True)
class LoadTest:
    """Everything the command line says."""

    url: str
    api_key: str | None = None
    endpoint: Endpoint = "completions"
    model: str | None = None
    limit_tokens: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    """Merged into every request."""
    workload: WorkloadOptions = field(default_factory=WorkloadOptions)
    trace: Path | None = None
    """Lengths and times come from this file; `workload` then gives only the seed and the ids."""
    trace_requests: int | None = None
    """So many of the trace's requests at most; None: all."""
    arrivals: OpenLoop | ClosedLoop = field(default_factory=lambda: ClosedLoop(4))
    sweep: tuple[LoadKind, tuple[float, ...]] | None = None
    slo: Slo = field(default_factory=Slo)
    warmup: int = 1
    """Requests before the clock starts, which count for nothing."""
    repeat: int = 4
    """Answers to ask for again alone."""
    timeout_s: float = 600.0
    settings: dict[str, Any] = field(default_factory=dict)
    """As the user wrote them, for the report."""

    def __post_init__(self) -> None:
        if self.trace is not None and self.sweep is not None:
            raise ConfigError("--trace has its own arrival times; leave out --sweep")
        if not self.timeout_s > 0 or self.warmup < 0 or self.repeat < 0:
            raise ConfigError("--timeout must be above 0, --warmup and --repeat at least 0")


@dataclass(frozen=True)
class Finished:
    """A test's outcome. `records` and `samples` are of the run that the report's figures are of."""

    report: Report
    records: list[Record]
    samples: ServerSamples


async def run_test(test: LoadTest, display: Display) -> Finished:
    """Run it, with progress on `display`. Ctrl-C ends the load early and still reports.

    Raises:
        ConfigError: the server cannot be reached or asked, or the workload cannot fit its limit.
    """
    address = Address.parse(test.url, test.api_key)
    text_only = test.endpoint == "chat" or test.workload.prompts == "text"
    kind = "text" if text_only else "ids"
    example = text_prompt(128, "example") if kind == "text" else ids_prompt(8, "example", test.workload.ids)
    display.stage(f"asking {address.url}")
    target = await find_target(
        address, test.endpoint, example, model=test.model, limit_tokens=test.limit_tokens, fields=test.fields
    )
    loads = test.sweep[1] if test.sweep is not None else (None,)
    async with _interruptible() as interrupt:
        outcomes = []
        for step, load in enumerate(loads):
            if not interrupt.is_set():
                # Other prompts at every step: a prefix cache must not flatter the later ones.
                seed = test.workload.seed + step * 1_000_000
                outcomes.append(await _run_once(_at_load(test, load, seed), target, display, interrupt))
        if test.sweep is None:
            (workload, result), sweep = outcomes[0], None
        else:
            sweep = sweep_of(
                test.sweep[0],
                [
                    (load, measure(done.records, test.slo))
                    for load, (_, done) in zip(loads, outcomes, strict=False)
                    if load
                ],
            )
            chosen = sweep.best if sweep.best is not None else sweep.steps[0].load
            workload, result = outcomes[[step.load for step in sweep.steps].index(chosen)]
        correctness = await _check(test, target, result, display, interrupt)
    measures = measure(result.records, test.slo)
    server = view_server(result.server)
    report = Report(
        title=Title(
            url=address.url,
            model=target.model,
            limit_tokens=target.limit_tokens,
            arrivals=_described(test, workload),
            version=__version__,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=test.settings,
        ),
        measures=measures,
        client_lag_ms=distribution(result.client.lag_ms),
        client_cpu=result.client.cpu_share,
        server=server,
        correctness=correctness,
        slo=str(test.slo),
        warnings=warnings_of(
            measures,
            result.client,
            server,
            correctness,
            shares_prompts=_shares_prompts(test),
            interrupted=result.interrupted,
        ),
        sweep=sweep,
    )
    return Finished(report, result.records, result.server)


def _described(test: LoadTest, workload: Workload) -> str:
    """When requests start, in words."""
    return f"trace {test.trace.name}" if test.trace is not None else workload.arrivals.describe()


def _shares_prompts(test: LoadTest) -> bool:
    return test.trace is not None or test.workload.turns > 1 or test.workload.shared_prefix_tokens > 0


def _at_load(test: LoadTest, load: float | None, seed: int) -> LoadTest:
    """The test with one load of its sweep."""
    if load is None or test.sweep is None:
        return test
    if test.sweep[0] == "concurrency":
        arrivals = ClosedLoop(int(load))
    else:
        given = test.arrivals
        arrivals = replace(given, rate_rps=load) if isinstance(given, OpenLoop) else OpenLoop(load)
    return replace(test, arrivals=arrivals, workload=replace(test.workload, seed=seed))


async def _run_once(
    test: LoadTest, target: Target, display: Display, interrupt: asyncio.Event
) -> tuple[Workload, RunResult]:
    options = test.workload
    display.stage("writing prompts")
    if test.trace is not None:
        conversations = read_trace(test.trace, options.seed, options.ids, limit=test.trace_requests)
        workload = Workload(conversations, OpenLoop(1.0))
    else:
        workload = write_workload(options, test.arrivals, lambda index: display.stage(f"writing prompt {index + 1}"))
    workload.check_fits(target.limit_tokens)
    if test.warmup and test.trace is None:
        display.stage("warming up")
        plain = replace(options, requests=test.warmup, seed=-options.seed - 1, turns=1, cancel_share=0, slow_share=0)
        warmup = write_workload(plain, ClosedLoop(test.warmup))
        await run_workload(target, warmup, Live(test.warmup), timeout_s=test.timeout_s, interrupt=interrupt)
    live = Live(workload.requests)
    async with display.following(live, _described(test, workload)):
        result = await run_workload(target, workload, live, timeout_s=test.timeout_s, interrupt=interrupt)
    if not result.records:
        raise ConfigError("interrupted before the first request had ended: there is nothing to report")
    return workload, result


async def _check(
    test: LoadTest, target: Target, result: RunResult, display: Display, interrupt: asyncio.Event
) -> Correctness:
    """Answers are compared only after a run of full length: a user who interrupts wants to see figures."""
    repeat = 0 if interrupt.is_set() else test.repeat
    return await check_correctness(
        target,
        result.records,
        result.bodies,
        repeat=repeat,
        seed=test.workload.seed,
        timeout_s=test.timeout_s,
        repeated=lambda done: display.stage(f"asking again alone: {done} of {repeat}"),
    )


@contextlib.asynccontextmanager
async def _interruptible() -> AsyncIterator[asyncio.Event]:
    """An event that the first Ctrl-C sets; a second one ends the program."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        event.set()
        loop.remove_signal_handler(signal.SIGINT)

    with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: then nobody can press a key
        loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)
