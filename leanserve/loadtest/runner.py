"""Runs a workload: one event loop, nothing in it but reading, sending, and a timer that watches the loop itself."""

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from secrets import token_hex

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.arrivals import ClosedLoop
from leanserve.loadtest.client_load import ClientLoad, LoadSampler
from leanserve.loadtest.completion import complete
from leanserve.loadtest.http_stream import Inbox
from leanserve.loadtest.prompts import Prompt, answer_part
from leanserve.loadtest.record import Record
from leanserve.loadtest.scrape import Scraper, ServerSamples
from leanserve.loadtest.target import Target
from leanserve.loadtest.workload import Conversation, Workload

__all__ = ["Live", "RunResult", "run_workload"]

_LEAD_S = 0.05
"""Between the decision to start and an open loop's first intended start."""


@dataclass
class Live:
    """What a progress display reads while a run goes on."""

    total: int
    started: int = 0
    ended: int = 0
    errors: int = 0
    tokens: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    e2e_ms: list[float] = field(default_factory=list)


@dataclass
class RunResult:
    """A finished run, nothing interpreted yet."""

    records: list[Record]
    """By index."""
    bodies: dict[int, bytes]
    """What each request that was sent asked, by index, to ask it again alone."""
    client: ClientLoad
    server: ServerSamples
    origin_ns: int
    """The run's start on time.perf_counter_ns, which all processes of a machine share."""
    interrupted: bool
    """Ended by the user; requests under way are not in the records."""


async def run_workload(
    target: Target, workload: Workload, live: Live, *, timeout_s: float, interrupt: asyncio.Event | None = None
) -> RunResult:
    """Run every conversation. `live` is updated on the way. Setting `interrupt` ends the run early.

    Raises:
        ConfigError: a later turn needs what the server does not send.
    """
    run = _Run(target, workload, live, timeout_s)
    scraper = Scraper(target.address)
    await scraper.sample()
    gc.collect()
    gc.disable()  # a full collection takes longer than a token
    try:
        async with LoadSampler() as sampler, scraper:
            asking = asyncio.create_task(run.all(), name="run")
            stop = asyncio.create_task((interrupt or asyncio.Event()).wait())
            await asyncio.wait({asking, stop}, return_when=asyncio.FIRST_COMPLETED)
            interrupted = not asking.done()
            stop.cancel()
            asking.cancel()
            await asyncio.gather(asking, stop, return_exceptions=True)
            if not interrupted:
                try:
                    asking.result()
                except ExceptionGroup as group:  # of conversations: the first that could not go on ended the others
                    raise group.exceptions[0] from None
    finally:
        gc.enable()
    await scraper.settle()
    run.records.sort(key=lambda record: record.index)
    return RunResult(run.records, run.bodies, sampler.load, scraper.samples(run.origin_ns), run.origin_ns, interrupted)


class _Run:
    def __init__(self, target: Target, workload: Workload, live: Live, timeout_s: float) -> None:
        self.origin_ns = 0
        self.records: list[Record] = []
        self.bodies: dict[int, bytes] = {}
        self._target = target
        self._workload = workload
        self._live = live
        self._timeout_s = timeout_s
        self._inbox = Inbox()
        self._name = token_hex(4)

    async def all(self) -> None:
        self.origin_ns = time.perf_counter_ns() + round(_LEAD_S * 1e9)
        if isinstance(self._workload.arrivals, ClosedLoop):
            waiting = iter(enumerate(self._workload.conversations))

            async def worker() -> None:
                for number, conversation in waiting:
                    await self._converse(number, conversation, max(self.origin_ns, time.perf_counter_ns()))

            await self._sleep_until(self.origin_ns)
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workload.arrivals.concurrency):
                    group.create_task(worker())
        else:
            async with asyncio.TaskGroup() as group:
                for number, conversation in enumerate(self._workload.conversations):
                    assert conversation.start_s is not None
                    intended_ns = self.origin_ns + round(conversation.start_s * 1e9)
                    await self._sleep_until(intended_ns)
                    group.create_task(self._converse(number, conversation, intended_ns))

    async def _sleep_until(self, at_ns: int) -> None:
        if (left_ns := at_ns - time.perf_counter_ns()) > 0:
            await asyncio.sleep(left_ns / 1e9)

    async def _converse(self, number: int, conversation: Conversation, intended_ns: int) -> None:
        said = Prompt(conversation.turns[0].prompt.kind, b"", 0)
        for place, turn in enumerate(conversation.turns):
            asked = said + turn.prompt
            body = self._target.body(
                asked, turn.output_tokens, cache_salt=self._name, stops_itself=turn.needle is not None
            )
            self.bodies[turn.index] = body
            self._live.started += 1
            record = await complete(
                self._target,
                self._inbox,
                body,
                turn,
                place=(number, place),
                request_id=f"lt-{self._name}-{turn.index}",
                intended_ns=intended_ns,
                origin_ns=self.origin_ns,
                timeout_s=self._timeout_s,
                on_chunk=self._chunk_counter(intended_ns),
            )
            record.prompt_tokens_asked = asked.tokens
            self.records.append(record)
            self._live.ended += 1
            self._live.errors += record.outcome == "error"
            if record.e2e_ms is not None:
                self._live.e2e_ms.append(record.e2e_ms)
            if record.outcome not in ("ok", "slow"):
                return  # nothing to go on from
            if place + 1 < len(conversation.turns):
                if asked.kind == "ids" and record.token_ids is None:
                    raise ConfigError(
                        "--turns needs the answer's token ids, and this server sends none; add --prompts text"
                    )
                said = asked + answer_part(asked.kind, record.token_ids or [], record.text, record.output_tokens or 0)
                intended_ns = time.perf_counter_ns()

    def _chunk_counter(self, intended_ns: int) -> Callable[[int, int, bool], None]:
        live = self._live

        def count(arrived_ns: int, tokens: int, is_first: bool) -> None:
            live.tokens += tokens
            if is_first:
                live.ttft_ms.append((arrived_ns - intended_ns) / 1e6)

        return count
