"""What the server says of itself: /metrics before, during and after a run. A server without it is no error.

Prometheus names are matched by their ends, so that `vllm:num_requests_running` and `leanserve:num_requests_running` are
the same thing. Where there is no /metrics, LeanServe's /health tells load and pages.
"""

import asyncio
import re
import time
from types import TracebackType

import msgspec
import orjson
from msgspec.structs import replace

from leanserve.loadtest.http_stream import Address, TransportError, fetch

__all__ = ["Sample", "Scraper", "ServerSamples", "read_health", "read_metrics"]

_INTERVAL_S = 1.0
_SETTLE_S = 5.0

_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_NAMES = {
    "running": ("num_requests_running", "num_running_reqs", "requests_processing", "tgi_batch_current_size"),
    "waiting": ("num_requests_waiting", "num_queue_reqs", "requests_deferred", "tgi_queue_size"),
    "kv_use": ("kv_cache_usage_perc", "gpu_cache_usage_perc", "token_usage", "kv_cache_usage_ratio"),
    "preemptions": ("num_preemptions", "num_preemptions_total"),
    "cache_queries": ("prefix_cache_queries", "prefix_cache_queries_total"),
    "cache_hits": ("prefix_cache_hits", "prefix_cache_hits_total"),
}
_FIELDS = {name: field for field, names in _NAMES.items() for name in names}
_PER_RANK = ("kv_cache_pages_used", "kv_cache_usage_perc")
_WANTED = frozenset((*_FIELDS, *_PER_RANK))


class Sample(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The server at one moment; None for what it does not tell."""

    at_s: float
    """From the run's start; negative before it."""
    running: float | None = None
    waiting: float | None = None
    kv_use: float | None = None
    """Share of the KV memory in use, 0 to 1; the fullest where several are told."""
    kv_per_rank: dict[str, float] | None = None
    """By rank: pages referenced, or the share in use, whichever is told."""
    preemptions: float | None = None
    cache_queries: float | None = None
    cache_hits: float | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, no page is referenced."""
        return not any((self.running, self.waiting, self.kv_use, *(self.kv_per_rank or {}).values()))


class ServerSamples(msgspec.Struct, kw_only=True):
    """All samples of a run, in order of time."""

    source: str | None = None
    """The route they come from; None where the server has none."""
    samples: list[Sample] = []


def read_metrics(text: str, at_s: float) -> Sample:
    """Read a page of Prometheus' text format; what it does not hold stays None. Takes some 4 ms for 1 MB of it."""
    sample = Sample(at_s=at_s)
    for line in text.splitlines():
        begin = line.partition("{")[0].split(maxsplit=1)
        # Requests are timed on this thread meanwhile: the many lines that are not wanted get no regular expression.
        if not begin or (name := begin[0].rpartition(":")[2]) not in _WANTED or not (match := _LINE.match(line)):
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        labels = dict(_LABEL.findall(match[2] or ""))
        if "rank" in labels and name in _PER_RANK:
            per_rank = sample.kv_per_rank = sample.kv_per_rank or {}
            per_rank[labels["rank"]] = value
        if (field := _FIELDS.get(name)) is not None:
            before = getattr(sample, field)
            # Several engines behind one page: their requests add up, and the fullest memory is what matters.
            both = max(before or 0, value) if field == "kv_use" else (before or 0) + value
            setattr(sample, field, both)
    return sample


def read_health(content: bytes, at_s: float) -> Sample | None:
    """Read LeanServe's /health; None if it is another server's."""
    try:
        body = orjson.loads(content)
        pages = body["pages_used_per_rank"]
        per_rank = {str(rank): float(used) for rank, used in enumerate(pages)}
        return Sample(at_s=at_s, running=body["running"], waiting=body["waiting"], kv_per_rank=per_rank)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


class Scraper:
    """Samples once a second while entered. A page is read as it comes and let go: a run may last for days."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._route: str | None = "/metrics"
        self._samples: list[Sample] = []
        """With the times of time.perf_counter."""

    async def __aenter__(self) -> "Scraper":
        self._task = asyncio.create_task(self._repeat(), name="scrape")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def sample(self) -> None:
        """Ask once. A first refusal changes to /health, a second ends the asking."""
        while self._route is not None:
            try:
                status, content = await fetch(self._address, "GET", self._route, timeout_s=5)
            except TransportError:
                return
            if status == 200 and (read := _read(self._route, content, time.perf_counter())):
                self._samples.append(read)
                return
            if self._samples:
                return
            self._route = "/health" if self._route == "/metrics" else None

    async def settle(self) -> None:
        """Ask until the server is idle, for a few seconds at most: the last sample is the state it was left in."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            await self.sample()
            if self._route is None or not self._samples or time.monotonic() > deadline:
                return
            if self._samples[-1].is_idle:
                return
            await asyncio.sleep(0.1)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.sample()

    def samples(self, origin_ns: int) -> ServerSamples:
        """Everything seen, with times from `origin_ns` of time.perf_counter_ns."""
        samples = [replace(sample, at_s=sample.at_s - origin_ns / 1e9) for sample in self._samples]
        return ServerSamples(source=self._route if samples else None, samples=samples)


def _read(route: str, content: bytes, at_s: float) -> Sample | None:
    if route == "/metrics":
        return read_metrics(content.decode(errors="replace"), at_s)
    return read_health(content, at_s)
