"""Requests that wait, or take, too long."""

import asyncio
import time
from typing import Any

import pytest

from server.front_end import live_server, parse_events, run


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_that_does_not_begin_is_answered_408(stream: bool) -> None:
    async def scenario() -> None:
        async with live_server(settings={"queue_timeout_s": 0.1}) as live:
            reply = await live.complete(prompt=[live.engine.stall_token], max_tokens=5, stream=stream)
            assert reply.status_code == 408
            assert reply.json()["error"]["code"] == "queue_timeout"
            await live.quiet()
            assert sum(live.engine.aborts.values()) == 1
            assert (await live.complete(prompt=[5], max_tokens=5, stream=stream)).status_code == 200

    run(scenario())


def test_a_request_that_has_begun_may_take_its_time_in_the_queue_no_longer() -> None:
    async def scenario() -> None:
        async with live_server(step_s=0.02, settings={"queue_timeout_s": 0.1}) as live:
            chunks = await live.chunks(prompt=[5, 6], max_tokens=20)
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    run(scenario())


def test_a_request_that_does_not_end_is_stopped() -> None:
    async def scenario() -> None:
        async with live_server(step_s=0.01, settings={"request_timeout_s": 0.3}) as live:
            body: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 4000}
            began = time.perf_counter()
            whole, stream = await asyncio.gather(live.complete(**body), live.complete(**body, stream=True))
            assert time.perf_counter() - began < 5
            assert (whole.status_code, whole.json()["error"]["code"]) == (408, "total_timeout")
            events = parse_events(stream.text)
            assert len(events) > 2
            assert events[-1]["error"]["code"] == "total_timeout"
            await live.quiet()
            assert len(live.engine.aborts) == 2

    run(scenario())
