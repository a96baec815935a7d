"""Requests that wait, or take, too long."""

import asyncio
import dataclasses
import gc
import weakref

import pytest

from leanserve.contracts.errors import EngineError
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.engine_client import token_bytes
from leanserve.server.output_stream import OutputStream
from server.front_end import connected, live_server, parse_events, run, until


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_that_does_not_begin_is_answered_408(stream: bool) -> None:
    async def scenario() -> None:
        async with live_server(settings={"queue_timeout_s": 0.1}) as live:
            reply = await live.complete(prompt=[live.engine.stall_token], max_tokens=5, stream=stream)
            assert reply.status_code == 408
            assert reply.json()["error"]["code"] == "queue_timeout"
            await live.quiet()
            assert sum(live.engine.aborts.values()) == 1
            live.serving.settings = dataclasses.replace(live.serving.settings, queue_timeout_s=None)
            assert (await live.complete(prompt=[5], max_tokens=5, stream=stream)).status_code == 200

    run(scenario())


def test_a_request_that_has_begun_may_take_its_time_in_the_queue_no_longer() -> None:
    async def scenario() -> None:
        async with connected(step_s=0.005) as (client, _):
            stream = client.open_stream()
            stream.submit("r", token_bytes([5, 6]), SamplingParams(max_tokens=20))
            assert await stream.next() is not None
            stream.limit(0.01, None)
            while not stream.finished:
                output = await stream.next()
            assert output is not None
            assert output.finish_reason == "length"

    run(scenario())


@pytest.mark.parametrize("end", ["a stop string", "an error"])
def test_nothing_of_a_stream_that_has_ended_is_kept_until_its_deadline(end: str) -> None:
    async def scenario() -> None:
        stream = OutputStream(lambda *_: None, lambda *_: None, 10)
        stream.submit("r", token_bytes([5]), SamplingParams())
        stream.limit(None, 3600)
        if end == "an error":
            stream.fail(EngineError("it failed"))
        else:
            stream.abort("r", reason="stop")
        kept = weakref.ref(stream)
        del stream
        gc.collect()
        assert kept() is None

    run(scenario())


def test_a_request_that_does_not_end_is_stopped() -> None:
    async def scenario() -> None:
        async with live_server(settings={"request_timeout_s": 0.1}) as live:
            whole = await live.complete(prompt=[live.engine.stall_token], max_tokens=5)
            assert (whole.status_code, whole.json()["error"]["code"]) == (408, "total_timeout")
            await live.quiet()
            assert len(live.engine.aborts) == 1

    run(scenario())


def test_a_stream_that_does_not_end_says_why_it_was_stopped() -> None:
    async def scenario() -> None:
        async with live_server(pause_at_tokens=3) as live:
            answer = asyncio.create_task(live.complete(prompt=[5, 6], max_tokens=4000, stream=True))
            await until(lambda: live.client.statistics.generation_tokens == 3)
            (request,) = live.client.live
            request.stream.limit(None, 0.01)
            *chunks, error = parse_events((await answer).text)
            assert len(chunks) == 3
            assert error["error"]["code"] == "total_timeout"
            await live.quiet()
            assert len(live.engine.aborts) == 1

    run(scenario())
