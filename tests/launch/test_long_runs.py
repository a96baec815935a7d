"""Many requests, long idleness and far too many requests: a server stays what it was.

SOAK_REQUESTS (20000) and OVERLOAD_SECONDS (60) make the runs shorter.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from checkpoints import checkpoint, random_prompts
from live_server import LiveServer, live_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SMALL = ("--device", "cpu", "--page-tokens", "16", "--kv-memory", "8MiB", "--step-timeout", "30")
FAULTS = str(Path(__file__).with_name("faults"))
SOAK_REQUESTS = int(os.environ.get("SOAK_REQUESTS", "20000"))
OVERLOAD_S = float(os.environ.get("OVERLOAD_SECONDS", "60"))
ROUNDS, WARM_UP_ROUNDS = 10, 3
CONCURRENCY = 32
SETTLED_S = 1.0
"""After a round, for connections to be closed on both sides."""
MOST_BYTES_PER_1000 = 1 << 20
SLOTS = 4
"""Requests that the overloaded server takes at once; without a queue, that is its capacity."""
OVERLOAD = 4
LATENCY_RATIO, REFUSAL_S, RECOVERED_S = 1.5, 0.05, 2.0
GROUP_TIMEOUT_S = 8


@dataclass
class Size:
    """What one process holds, round by round."""

    resident: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def look(self, process: psutil.Process) -> None:
        self.resident.append(process.memory_info().rss)
        self.descriptors.append(process.num_fds())
        self.threads.append(process.num_threads())

    def slope(self, per_round: int) -> float:
        """Bytes for each 1,000 requests, by least squares."""
        xs = [round_ * per_round / 1000 for round_ in range(len(self.resident))]
        return statistics.linear_regression(xs, self.resident).slope


def test_nothing_grows_over_20000_short_requests(tmp_path_factory, tmp_path) -> None:
    """A fifth of them is cancelled, in every phase."""
    model_dir = checkpoint(tmp_path_factory, "llama", layers=1)
    prompts = random_prompts([1 + 7 * (i % 11) for i in range(50)], seed=31)
    per_round = SOAK_REQUESTS // ROUNDS
    with live_server(str(model_dir), "--ranks", "2", *SMALL, log=tmp_path / "log") as server:
        sizes = {process: Size() for process in server.processes()}
        for round_ in range(ROUNDS):
            asyncio.run(ask_all(server, prompts, range(round_ * per_round, (round_ + 1) * per_round)))
            time.sleep(SETTLED_S)
            if round_ >= WARM_UP_ROUNDS:
                for process, size in sizes.items():
                    size.look(process)
        for process, size in sizes.items():
            name = " ".join(process.cmdline()[1:4])
            print(f"{name}: {size.slope(per_round) / 2**10:+.0f} KiB per 1,000 requests, {size}")
        for size in sizes.values():
            assert size.slope(per_round) < MOST_BYTES_PER_1000
            assert max(size.descriptors) - min(size.descriptors) <= 2
            assert max(size.threads) - min(size.threads) <= 2
        assert sum(httpx.get(f"{server.url}/health").json()["pages_used_per_rank"]) == 0


async def ask_all(server: LiveServer, prompts: list[list[int]], numbers: range) -> None:
    places = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

        async def one(number: int) -> None:
            body: dict[str, Any] = {"prompt": prompts[number % 50], "max_tokens": 1 + number % 5, "ignore_eos": True}
            async with places:
                if number % 5:
                    response = await client.post("/v1/completions", json=body)
                    assert response.json()["usage"]["completion_tokens"] == body["max_tokens"]
                    return
                try:
                    async with asyncio.timeout((number % 7) * 0.01):
                        await client.post("/v1/completions", json=body | {"max_tokens": 1000})
                except TimeoutError:
                    pass

        await asyncio.gather(*(one(number) for number in numbers))
        async with asyncio.timeout(30):
            while (await client.get("/health")).json()["live_requests"]:
                await asyncio.sleep(0.05)


def test_a_time_without_work_longer_than_the_groups_timeout_is_no_failure(tmp_path_factory, tmp_path) -> None:
    model_dir = checkpoint(tmp_path_factory, "llama")
    environment = {
        "PYTHONPATH": os.pathsep.join([FAULTS, os.environ.get("PYTHONPATH", "")]),
        "FAULT_GROUP_TIMEOUT": str(GROUP_TIMEOUT_S),
    }
    log = tmp_path / "log"
    with live_server(str(model_dir), "--ranks", "3", *SMALL, log=log, environment=environment) as server:
        for _ in range(2):
            assert server.post(prompt=[5, 6, 7], max_tokens=5).status_code == 200
            time.sleep(2.5 * GROUP_TIMEOUT_S)
        assert server.post(prompt=[5, 6, 7], max_tokens=5).status_code == 200
    assert "restart" not in log.read_text()


@dataclass
class Load:
    """Seconds that accepted and refused requests took."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)

    async def ask(self, client: httpx.AsyncClient) -> None:
        began = time.perf_counter()
        body = {"prompt": [5] * 20, "max_tokens": 40, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body)
        took = time.perf_counter() - began
        assert response.status_code in (200, 503), response.text
        if response.status_code == 503:
            assert "retry-after" in response.headers
        (self.accepted if response.status_code == 200 else self.refused).append(took)


def test_four_times_too_many_requests_do_not_slow_those_that_are_accepted(tmp_path_factory, tmp_path) -> None:
    model_dir = checkpoint(tmp_path_factory, "llama")
    limits = ("--ranks", "2", "--max-live-requests", str(SLOTS), "--max-sequences", str(SLOTS))
    with live_server(str(model_dir), *SMALL, *limits, log=tmp_path / "log") as server:
        alone, over, after = asyncio.run(overload(server))
    for name, load in (("at capacity", alone), ("overloaded", over), ("afterwards", after)):
        print(f"{name}: {described(load.accepted)} accepted; {described(load.refused)} refused")
    assert len(over.refused) > len(over.accepted)
    assert alone.refused == after.refused == []
    for share in (0.5, 0.95):
        assert quantile(over.accepted, share) <= LATENCY_RATIO * quantile(alone.accepted, share)
        assert quantile(after.accepted, share) <= LATENCY_RATIO * quantile(alone.accepted, share)
    assert quantile(over.refused, 0.99) <= REFUSAL_S


async def overload(server: LiveServer) -> tuple[Load, Load, Load]:
    """The same requests from as many clients as there is room for, at four times that rate, and again."""
    no_limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=no_limits) as client:
        await at_capacity(Load(), client, 1.0)
        alone = Load()
        seconds = max(OVERLOAD_S / 6, 3.0)
        await at_capacity(alone, client, seconds)
        rate = OVERLOAD * len(alone.accepted) / seconds
        over = Load()
        tasks: list[asyncio.Task[None]] = []
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + OVERLOAD_S:
            while len(tasks) < (now - began) * rate:
                tasks.append(asyncio.create_task(over.ask(client)))
            await asyncio.sleep(0.001)
        await asyncio.sleep(RECOVERED_S)
        assert all(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        after = Load()
        await at_capacity(after, client, seconds)
    return alone, over, after


async def at_capacity(load: Load, client: httpx.AsyncClient, seconds: float) -> None:
    until = time.perf_counter() + seconds

    async def one_after_the_other(ask: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        while time.perf_counter() < until:
            await ask(client)

    await asyncio.gather(*(one_after_the_other(load.ask) for _ in range(SLOTS)))


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def described(values: list[float]) -> str:
    if not values:
        return "none"
    shares = ", ".join(f"p{100 * share:g} {1e3 * quantile(values, share):.1f} ms" for share in (0.5, 0.95, 0.99))
    return f"{len(values)} ({shares})"
