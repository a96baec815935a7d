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
_PER_RANK = ("kv_cache_pages_used", "kv_cache_usage_perc")


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
    """Read a page of Prometheus' text format; what it does not hold stays None."""
    sample = Sample(at_s=at_s)
    for line in text.splitlines():
        if line.startswith("#") or not (match := _LINE.match(line)):
            continue
        name = match[1].rpartition(":")[2]
        try:
            value = float(match[3])
        except ValueError:
            continue
        labels = dict(_LABEL.findall(match[2] or ""))
        if "rank" in labels and name in _PER_RANK:
            per_rank = sample.kv_per_rank = sample.kv_per_rank or {}
            per_rank[labels["rank"]] = value
        for field, names in _NAMES.items():
            if name in names or match[1] in names:
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
    """Samples once a second while entered. Pages are kept as they came and read after the run."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._route: str | None = "/metrics"
        self._pages: list[tuple[int, str, bytes]] = []

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
            if status == 200 and (self._route == "/metrics" or read_health(content, 0.0)):
                self._pages.append((time.perf_counter_ns(), self._route, content))
                return
            if self._pages:
                return
            self._route = "/health" if self._route == "/metrics" else None

    async def settle(self) -> None:
        """Ask until the server is idle, for a few seconds at most: the last sample is the state it was left in."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            await self.sample()
            if self._route is None or not self._pages or time.monotonic() > deadline:
                return
            if _read(*self._pages[-1], origin_ns=0).is_idle:
                return
            await asyncio.sleep(0.1)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.sample()

    def samples(self, origin_ns: int) -> ServerSamples:
        """Everything seen, with times from `origin_ns` of time.perf_counter_ns."""
        read = [_read(*page, origin_ns=origin_ns) for page in self._pages]
        return ServerSamples(source=self._pages[-1][1] if self._pages else None, samples=read)


def _read(at_ns: int, route: str, content: bytes, *, origin_ns: int) -> Sample:
    at_s = (at_ns - origin_ns) / 1e9
    if route == "/metrics":
        return read_metrics(content.decode(errors="replace"), at_s)
    return read_health(content, at_s) or Sample(at_s=at_s)
