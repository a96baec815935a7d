"""Memory and pages over many requests, on real processes."""

import asyncio

import httpx
import psutil

from checkpoints import checkpoint, random_prompts
from live_server import live_server

REQUESTS = 2000
CONCURRENCY = 32


def resident_bytes(processes: list[psutil.Process]) -> list[int]:
    return [process.memory_info().rss for process in processes]


def test_memory_is_flat_over_2000_requests(tmp_path_factory, tmp_path):
    """Mixed lengths, a tenth of them cancelled: no process grows, and no page stays in use."""
    model_dir = checkpoint(tmp_path_factory, "llama", layers=1)
    prompts = random_prompts([1 + 7 * (i % 11) for i in range(50)], seed=31)
    arguments = ("--ranks", "1", "--device", "cpu", "--page-tokens", "16", "--kv-memory", "4MiB")
    with live_server(str(model_dir), *arguments, log=tmp_path / "log") as server:
        processes = server.processes()

        async def one(client: httpx.AsyncClient, number: int) -> None:
            body = {"prompt": prompts[number % 50], "max_tokens": 1 + number % 5, "ignore_eos": True}
            if number % 10:
                response = await client.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                assert response.json()["usage"]["completion_tokens"] == body["max_tokens"]
            else:
                body |= {"stream": True, "max_tokens": 1000}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    await anext(response.aiter_lines())

        async def run(first: int, last: int) -> None:
            places = asyncio.Semaphore(CONCURRENCY)
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

                async def limited(number: int) -> None:
                    async with places:
                        await one(client, number)

                await asyncio.gather(*(limited(number) for number in range(first, last)))

        asyncio.run(run(0, REQUESTS // 4))  # warm-up: allocators, caches
        before = resident_bytes(processes)
        asyncio.run(run(REQUESTS // 4, REQUESTS))
        growth = [after - b for after, b in zip(resident_bytes(processes), before, strict=True)]
        assert max(growth) < 4 << 20, f"bytes gained by each process: {growth}"
