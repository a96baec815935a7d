"""Where a prompt stands, told by a real engine in comments and in chunks; and pages that are free once nobody waits."""

import asyncio
import contextlib
import json
import queue
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import zmq

from engine.fake_executors import EchoExecutor
from leanserve.contracts.batch import Batch
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import EngineReady, encode
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.engine.service import serve
from leanserve.server.app import create_app
from leanserve.server.engine_client import EngineClient
from leanserve.server.http_server import bind_socket, serve_http
from leanserve.server.settings import ServerSettings
from server.echo_engine import engine_info
from server.front_end import PATIENCE_S, parse_events, run, until

SHARDING = KvSharding(page_tokens=4, pages_per_rank=(60, 60))
LONG = [5] * 400
"""At 8 tokens a step, 50 steps."""


class SteppedExecutor(EchoExecutor):
    """Echoes. A step ends when it is allowed to, or when a message for the engine has come meanwhile."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        super().__init__()
        self._socket = socket
        self._allowed = threading.Semaphore(0)
        self._free = threading.Event()

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)

    def set_free(self) -> None:
        self._free.set()

    def launch(self, batch: Batch) -> None:
        while not (self._free.is_set() or self._allowed.acquire(timeout=0.001) or self._socket.poll(0)):
            pass
        super().launch(batch)


@dataclass
class Real:
    http: httpx.AsyncClient
    client: EngineClient
    scheduler: Scheduler
    executor: SteppedExecutor

    @property
    def pages_used(self) -> int:
        return sum(self.scheduler.pages_used_per_rank)


@contextlib.asynccontextmanager
async def real_engine(**settings: Any) -> AsyncIterator[Real]:
    """The front end before the real engine, whose steps are computed by nobody, and when the test says so: every token
    is the sequence's number."""
    directory = tempfile.mkdtemp(prefix="ls-")
    address = f"ipc://{directory}/engine"
    scheduler = Scheduler(SHARDING, BatchOptions(max_batch_tokens=8, max_sequences=2), 480, prefix_cache=False)
    stop = threading.Event()
    executors: queue.SimpleQueue[SteppedExecutor] = queue.SimpleQueue()

    def compute() -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(address)
            socket.send(encode(EngineReady(engine_info(max_context_tokens=480))))
            executor = SteppedExecutor(socket)
            executors.put(executor)
            serve(Engine(scheduler, executor, ()), socket, stop)

    client = EngineClient(address)
    client.start()
    thread = threading.Thread(target=compute)
    thread.start()
    await client.engine.wait_ready()
    executor = await asyncio.to_thread(executors.get)
    listener = bind_socket("127.0.0.1", 0)
    app = create_app(client, None, ServerSettings(model_names=("real",), **settings))
    ended = asyncio.Event()
    served = asyncio.create_task(serve_http(app, listener, stop=ended, grace_s=0.1))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=PATIENCE_S) as http:
        yield Real(http, client, scheduler, executor)
    executor.set_free()
    ended.set()
    await served
    stop.set()
    await asyncio.to_thread(thread.join)
    await client.close()
    shutil.rmtree(directory)


def body(prompt: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "return_token_ids": True, **fields}


def test_progress_chunks_count_up_to_the_whole_prompt() -> None:
    async def scenario() -> None:
        async with real_engine() as real:
            chunks: list[dict[str, Any]] = []
            real.executor.allow(1)
            wanted = body(LONG, 3, return_progress=True)
            async with real.http.stream("POST", "/v1/completions", json=wanted) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        chunks.append(json.loads(line.removeprefix("data: ")))
                        real.executor.allow(1)
            told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
            assert all(chunk["choices"] == [] for chunk in chunks[: len(told)])
            assert all(set(place) == {"total", "cached", "processed", "time_ms"} for place in told)
            assert [place["processed"] for place in told] == list(range(8, 401, 8))
            assert {place["total"] for place in told} == {400}
            assert [place["time_ms"] for place in told] == sorted(place["time_ms"] for place in told)
            assert [chunk["choices"][0]["token_ids"] for chunk in chunks[len(told) :]] == [[1], [1], [1]]
            real.executor.set_free()
            plain = parse_events((await real.http.post("/v1/completions", json=body(LONG, 3))).text)
            assert not [chunk for chunk in plain if "prompt_progress" in chunk]
            waited = real.client.statistics
            assert abs(waited.prefill_s.sum + waited.queue_s.sum - waited.time_to_first_token_s.sum) < 1e-6
            assert waited.prefill_s.sum > 0

    run(scenario())


def test_comments_say_where_the_prompt_stands() -> None:
    async def scenario() -> None:
        async with real_engine(keep_alive_s=0.01) as real:
            real.executor.allow(1)
            places: list[int] = []
            async with real.http.stream("POST", "/v1/completions", json=body(LONG, 1)) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith(": prefill "):
                        processed, total = line.split()[2].split("/")
                        assert total == "400"
                        if int(processed) not in places:
                            real.executor.allow(5)
                        places.append(int(processed))
            assert places[0] == 8
            assert len(set(places)) >= 10
            assert places == sorted(places)

    run(scenario())


@pytest.mark.parametrize("phase", ["queued", "prefill", "decode", "last token"])
@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
def test_a_disconnect_frees_the_pages_within_a_step(phase: str, streamed: bool) -> None:
    """The step under way ends when the abort has come, and the next one knows of it."""

    async def scenario() -> None:
        async with real_engine() as real:
            scheduler, statistics = real.scheduler, real.client.statistics
            blockers = []
            if phase == "queued":  # two sequences fill the engine
                blockers = [asyncio.create_task(real.http.post("/v1/completions", json=body([5], 100))) for _ in "ab"]
                await until(lambda: scheduler.num_running == 2)
            prompt = LONG if phase == "prefill" else [5, 5]
            wanted = body(prompt, 2 if phase == "last token" else 60, stream=streamed)
            request = asyncio.create_task(read(real, wanted, until_token=phase == "last token" and streamed))
            match phase:
                case "queued":
                    await until(lambda: scheduler.num_waiting == 1)
                case "prefill":
                    real.executor.allow(12)
                    await until(lambda: real.pages_used == 26)
                case "decode":
                    real.executor.allow(5)
                    await until(lambda: statistics.generation_tokens == 5)
                case _:
                    real.executor.allow(1)
                    await until(lambda: statistics.generation_tokens == 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            left = len(blockers)
            if phase == "last token":
                real.executor.set_free()
            else:
                step_under_way = scheduler.step
                await until(lambda: scheduler.num_waiting == 0 and scheduler.num_running == left)
                assert real.client.live_requests == left
                assert scheduler.step <= step_under_way + 1
            real.executor.set_free()
            await asyncio.gather(*blockers)
            await until(lambda: real.pages_used == 0)

    run(scenario())


async def read(real: Real, wanted: dict[str, Any], *, until_token: bool) -> None:
    async with real.http.stream("POST", "/v1/completions", json=wanted) as response:
        async for line in response.aiter_lines():
            if until_token and line.startswith("data: {") and json.loads(line[6:])["choices"]:
                return
