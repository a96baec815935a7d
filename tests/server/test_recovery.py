"""The front end over the deaths of engines: requests wait, go on where they were, and the deadly one is found."""

import asyncio
import contextlib
import re
from array import array
from collections.abc import AsyncIterator
from typing import Any

import pytest

from leanserve.contracts.errors import EngineError, OverloadedError
from leanserve.contracts.messages import EngineFailed, Hello, Logprobs, Pulse, TokenOutput, TokenOutputs
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.current_engine import CurrentEngine
from leanserve.server.engine_client import EngineClient, Recovery, token_bytes
from leanserve.server.live_requests import LiveRequest, LiveRequests
from leanserve.server.output_stream import OutputStream
from leanserve.server.rank_health import RankHealth
from leanserve.server.restart_budget import WINDOW_S, RestartBudget
from leanserve.server.statistics import RequestTimes
from server.echo_engine import EchoEngine
from server.front_end import connected, live_server, parse_events, run, until

RECOVERS: dict[str, Any] = {"recovery": Recovery(max_restarts=10)}


async def tokens_of(client: EngineClient, prompt: list[int], **sampling: Any) -> list[int]:
    outputs = client.generate(prompt, SamplingParams(**sampling))
    return [token for output in [output async for output in outputs] for token in output.token_ids]


@contextlib.asynccontextmanager
async def next_engine(client: EngineClient, **options: Any) -> AsyncIterator[EchoEngine]:
    """The engine that takes a dead one's place, ready."""
    await until(lambda: client.engine.state == "restarting")
    engine = EchoEngine(client.address, **options)
    try:
        await engine.load()
        await engine.ready()
        await until(lambda: client.engine.state == "ready")
        yield engine
    finally:
        await engine.close()


def test_requests_go_on_at_the_next_engine_with_nothing_lost_or_repeated() -> None:
    async def scenario() -> None:
        async with connected(pause_at_tokens=10, client_options=RECOVERS) as (client, engine):
            prompts = [[5, 6, 11], [8, 4], [10, 3, 3, 5, 6]]
            requests = [asyncio.create_task(tokens_of(client, prompt, max_tokens=60)) for prompt in prompts]
            await until(lambda: all(len(live.output_token_ids) > 5 for live in client.live) and len(client.live) == 3)
            await engine.close()
            await until(lambda: client.engine.state == "restarting")
            with pytest.raises(OverloadedError, match="restarted"):
                await tokens_of(client, [5], max_tokens=1)
            async with next_engine(client) as second:
                for prompt, tokens in zip(prompts, await asyncio.gather(*requests), strict=True):
                    assert tokens == (prompt * 60)[:60]
                assert [submit.request_id.rpartition("~")[2] for submit in second.submits] == ["2"] * 3
                assert all(submit.output_token_ids for submit in second.submits)
            assert (len(client.live), client.live_prompt_tokens) == (0, 0)

    run(scenario())


def test_the_seed_is_drawn_once() -> None:
    async def scenario() -> None:
        async with connected(client_options=RECOVERS) as (client, engine):
            stream = client.open_stream()
            for name, sampling in (
                ("drawn", SamplingParams()),
                ("given", SamplingParams(seed=7)),
                ("greedy", SamplingParams(temperature=0)),
            ):
                stream.submit(name, token_bytes([engine.stall_token]), sampling)
            await until(lambda: len(engine.submits) == 3)
            await engine.close()
            async with next_engine(client) as second:
                second.stall_token = -1
                while not stream.finished:
                    await stream.next()
                first_seeds = {submit.request_id: submit.sampling.seed for submit in engine.submits}
                assert {s.request_id.partition("~")[0]: s.sampling.seed for s in second.submits} == first_seeds
                assert first_seeds["drawn"] is not None
                assert (first_seeds["given"], first_seeds["greedy"]) == (7, None)

    run(scenario())


def test_a_request_that_kills_two_engines_is_not_given_to_a_third() -> None:
    async def scenario() -> None:
        async with connected(step_s=0.003, client_options=RECOVERS) as (client, engine):
            others = [asyncio.create_task(tokens_of(client, [5, 6] * n, max_tokens=200)) for n in (1, 2, 9)]
            await until(lambda: len(client.live) == 3)
            deadly = asyncio.create_task(tokens_of(client, [engine.deadly_token] * 6, max_tokens=5))
            engines = 0
            while not deadly.done():
                async with next_engine(client, step_s=0.003):
                    engines += 1
                    await until(lambda: client.engine.state == "restarting" or deadly.done())
            assert engines == 1
            with pytest.raises(EngineError, match="died twice while it worked on this request"):
                await deadly
            async with next_engine(client):
                assert [len(tokens) for tokens in await asyncio.gather(*others)] == [200] * 3

    run(scenario())


def test_without_resume_requests_end_and_the_next_engine_serves_new_ones() -> None:
    async def scenario() -> None:
        options = {"recovery": Recovery(max_restarts=2, resume=False)}
        async with connected(step_s=0.003, client_options=options) as (client, engine):
            request = asyncio.create_task(tokens_of(client, [5], max_tokens=1000))
            await until(lambda: len(engine.submits) == 1)
            await engine.close()
            with pytest.raises(EngineError, match="the engine stopped"):
                await request
            async with next_engine(client):
                assert await tokens_of(client, [5, 6], max_tokens=3) == [5, 6, 5]

    run(scenario())


def test_too_many_failures_are_final_and_the_last_word_says_so() -> None:
    async def scenario() -> None:
        async with connected(step_s=0.003, client_options={"recovery": Recovery(max_restarts=1)}) as (client, engine):
            request = asyncio.create_task(tokens_of(client, [5], max_tokens=10_000))
            await until(lambda: client.live_requests == 1)
            await engine.fail("it fell over")
            async with next_engine(client) as second:
                await second.fail("it fell over again")
                await until(lambda: client.engine.state == "failed")
            assert (
                client.engine.failure
                == "it fell over again; it failed 2 times within 10 minutes, and --max-restarts is 1"
            )
            with pytest.raises(EngineError, match="fell over again"):
                await request

    run(scenario())


def test_an_error_that_would_come_again_is_final_at_once() -> None:
    async def scenario() -> None:
        async with connected(client_options=RECOVERS, ready=False) as (client, engine):
            await engine.load()
            await until(lambda: client.engine.loading is not None)
            client.on_engine(EngineFailed("no such checkpoint", is_final=True))
            with pytest.raises(EngineError, match="no such checkpoint"):
                await client.engine.wait_ready()

    run(scenario())


def test_a_stream_lives_through_a_restart_with_keep_alives_and_others_are_told_to_wait() -> None:
    async def scenario() -> None:
        settings = {"keep_alive_s": 0.02}
        async with live_server(None, pause_at_tokens=10, settings=settings, client_options=RECOVERS) as live:
            body = {"prompt": [5, 6, 11], "max_tokens": 50, "return_token_ids": True, "stream": True}
            text = ""

            async def read() -> None:
                nonlocal text
                async with live.http.stream("POST", "/v1/completions", json=body) as response:
                    async for part in response.aiter_text():
                        text += part

            stream = asyncio.create_task(read())
            await until(lambda: any(len(request.output_token_ids) > 5 for request in live.client.live))
            await live.engine.close()
            await until(lambda: live.client.engine.state == "restarting")
            refused = await live.complete(prompt=[5], max_tokens=1)
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            assert (await live.http.get("/ready")).status_code == 503
            told = text.count(": keep-alive")
            await until(lambda: text.count(": keep-alive") >= told + 2)
            async with next_engine(live.client):
                await stream
                chunks = parse_events(text)
                assert [t for c in chunks for t in c["choices"][0]["token_ids"]] == ([5, 6, 11] * 50)[:50]
                assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    run(scenario())


def live_request(name: str, prompt_tokens: int) -> LiveRequest:
    stream = OutputStream(lambda *_: None, lambda *_: None, 1)
    times = RequestTimes(0.0, prompt_tokens)
    return LiveRequest(name, token_bytes([1] * prompt_tokens), SamplingParams(), stream, times)


def test_suspects_take_turns_and_newcomers_wait_for_them() -> None:
    live = LiveRequests()
    for name, size in (("long", 30), ("short", 2), ("gone", 1)):
        assert live.add(live_request(name, size)) is not None
    assert live.engine_lost() is None
    live.remove("gone")
    assert [submit.request_id for submit in live.to_resume()] == ["short~2"]
    assert live.to_resume() == []
    assert live.add(live_request("new", 1)) is None
    assert live.receive(TokenOutput("short", [4])) is None, "a word of the engine that died"
    received = live.receive(TokenOutput("short~2", [4]))
    assert received is not None
    assert received[1].request_id == "short"
    assert [submit.request_id for submit in live.to_resume()] == ["long~2"]
    assert live.remove("long") == "long~2"
    assert [submit.request_id for submit in live.to_resume()] == ["new"]
    assert live.on_probation is None
    assert live.prompt_tokens == 3
    assert live.engine_lost() is None, "nobody was on probation"


def test_a_new_engine_waits_longer_each_time_it_does_not_get_to_serve() -> None:
    budget = RestartBudget(7)
    assert [budget.spend(now) for now in range(4)] == [0.0, 1.0, 2.0, 4.0]
    budget.note_ready()
    assert [budget.spend(now) for now in range(4, 8)] == [0.0, 1.0, 2.0, None]
    assert budget.spend(WINDOW_S + 1.5) == 4.0, "the first two are forgiven"


def test_the_last_words_of_an_engine_are_no_other_ones() -> None:
    engine = CurrentEngine(max_restarts=5)
    engine.attach()
    engine.note_last_words("out of memory")
    engine.lose("its connection closed", [])
    assert engine.failure == "out of memory"
    engine.note_last_words("said after the end")
    engine.attach()
    engine.lose("its connection closed", [])
    assert engine.failure == "its connection closed"


def test_a_lost_engine_holds_no_pages_and_runs_nothing() -> None:
    async def scenario() -> None:
        async with live_server(None, pause_at_tokens=3, client_options=RECOVERS) as live:
            request = asyncio.create_task(live.complete(prompt=[5], max_tokens=9))
            await until(lambda: live.client.engine.load.running == 1)
            await live.engine.close()
            await until(lambda: live.client.engine.state == "restarting")
            request.cancel()
            health = (await live.http.get("/health")).json()
            assert (health["running"], health["pages_used_per_rank"]) == (0, [])
            metrics = (await live.http.get("/metrics")).text
            assert re.search(r"^leanserve:kv_cache_pages_used\{.*\} 0.0$", metrics, re.MULTILINE)

    run(scenario())


def test_a_new_engine_is_not_judged_by_what_ranks_of_the_one_before_say_late() -> None:
    async def scenario() -> None:
        options = {"recovery": Recovery(max_restarts=5), "step_timeout_s": 5.0}
        async with connected(client_options=options) as (client, _):
            client.lose("it was killed")
            client.on_rank(Pulse(1, 1, "here", 7, 9.0))
            client.on_engine(Hello(2))
            assert client.trouble() is None

    run(scenario())


def test_a_rank_that_is_silent_or_stuck_is_named() -> None:
    health = RankHealth(5.0)
    health.hear(Pulse(0, 100, "here", 7, 0.0), 10.0)
    health.hear(Pulse(1, 101, "there", 6, 3.0), 10.0)
    assert health.troubled(11.0) == {}
    assert list(health.troubled(13.0)) == [1]
    assert "rank 1 (pid 101) has not completed the step after 6 in 6.0 s" in health.troubled(13.0)[1]
    assert "rank 0 (pid 100) has been silent for 6.0 s" in health.troubled(16.0)[0]
    assert health.troubled(13.0, patience_s=2.0) == {}


def test_health_tells_of_trouble() -> None:
    async def scenario() -> None:
        async with live_server(client_options={"step_timeout_s": 1000.0}) as live:
            live.client.on_rank(Pulse(0, 1, "here", 3, 0.5))
            good = await live.http.get("/health")
            assert (good.status_code, good.json()["ranks"][0]["step"]) == (200, 3)
            live.client.on_rank(Pulse(1, 1, "here", 2, 9000.0))
            bad = await live.http.get("/health")
            assert bad.status_code == 503
            assert "rank 1" in bad.json()["error"]["message"]

    run(scenario())


def test_outputs_of_a_load_report_are_counted_once() -> None:
    live = LiveRequests()
    live.add(live_request("a", 3))
    message = TokenOutputs(1, [TokenOutput("a", [1, 2], "length")], 0, 0, (0,), 0)
    for output in message.outputs:
        assert live.receive(output) is not None
        assert live.receive(output) is None
    assert (len(live), live.prompt_tokens) == (0, 0)


def test_log_probabilities_of_a_prompt_are_told_once() -> None:
    def part(first: int, last: int) -> Logprobs:
        chosen = array("f", range(first, last)).tobytes()
        return Logprobs(0, chosen, array("i", range(first, last)).tobytes(), b"", b"")

    live = LiveRequests()
    live.add(live_request("a", 11))
    told: list[Logprobs] = []

    def hear(wire_id: str, first: int, last: int) -> None:
        received = live.receive(TokenOutput(wire_id, [], prompt_logprobs=part(first, last)))
        assert received is not None
        if received[1].prompt_logprobs is not None:
            told.append(received[1].prompt_logprobs)

    hear("a", 0, 4)
    live.engine_lost()
    live.to_resume()
    hear("a~2", 0, 3)
    hear("a~2", 3, 7)
    hear("a~2", 7, 10)
    assert [row.logprob for row in Logprobs.join(told).rows()] == list(range(10))
