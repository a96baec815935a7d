"""Memory, pages and disturbance over many requests, on real processes."""

import asyncio
import json

import httpx
import psutil

from checkpoints import checkpoint, hf_greedy, random_prompts
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


def test_bad_input_does_not_disturb_a_running_stream(tmp_path_factory, tmp_path):
    model_dir = checkpoint(tmp_path_factory, "llama")
    prompt = random_prompts([40], seed=32)[0]
    expected = hf_greedy(model_dir, [prompt], 300)[0]
    arguments = ("--ranks", "2", "--device", "cpu", "--page-tokens", "16", "--kv-memory", "8MiB")
    bad = [
        b"",
        b"{",
        b"[]",
        b'{"prompt": "' + b"x" * 10_000 + b'"}',
        b'{"prompt": []}',
        b'{"prompt": [1, 100000000000000000000]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [5000]}',
        b'{"prompt": [1], "max_tokens": 0}',
        b'{"prompt": [1], "max_tokens": 1e999}',
        b'{"prompt": [1], "max_tokens": true}',
        b'{"prompt": [1], "max_tokens": 1000000}',
        b'{"prompt": [1], "temperature": NaN}',
        b'{"prompt": [1], "temperature": -1}',
        b'{"prompt": [1], "top_p": "0.5"}',
        b'{"prompt": [1], "seed": 1.5}',
        b'{"prompt": [1], "stop": [""]}',
        b'{"prompt": [1], "stop": "x"}',
        b'{"prompt": [1], "model": "another"}',
        b'{"prompt": [1], "logit_bias": {"1": 500}}',
        b'{"prompt": [1], "n": 1000}',
        b'{"prompt": {"a": 1}}',
        b"[" * 100_000,
    ]
    with live_server(str(model_dir), *arguments, log=tmp_path / "log") as server:
        body = {"prompt": prompt, "max_tokens": 300, "temperature": 0, "stream": True, "return_token_ids": True}
        tokens: list[int] = []
        codes = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            left = iter(bad)
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                if (content := next(left, None)) is not None:
                    headers = {"content-type": "application/json"}
                    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
                    assert set(answer.json().get("error", {})) == {"message", "type", "param", "code"}, (
                        content[:80],
                        answer.text,
                    )
                    codes.append(answer.status_code)
        assert tokens == expected
        assert len(codes) == len(bad)
        assert set(codes) <= {400, 404}, codes
