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
from leanserve.server.errors import DeadlyRequestError, error_reply
from leanserve.server.live_requests import LiveRequest, LiveRequests
from leanserve.server.output_stream import OutputStream
from leanserve.server.probation import Probation
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


def test_a_request_that_kills_three_engines_is_not_given_to_a_fourth(caplog: pytest.LogCaptureFixture) -> None:
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
            assert engines == 2
            with pytest.raises(DeadlyRequestError, match="died twice while it worked on this request"):
                await deadly
            async with next_engine(client):
                assert [len(tokens) for tokens in await asyncio.gather(*others)] == [200] * 3

    run(scenario())
    events = [event for record in caplog.records if "request" in (event := getattr(record, "event", ""))]
    assert events == ["request_suspected", "request_poisonous"]


def test_a_deadly_request_is_not_to_be_sent_again() -> None:
    """openai's client, and others, send again what ended with a status like this, if no header says otherwise."""
    reply = error_reply(DeadlyRequestError("engines die of it"))
    assert (reply.status, reply.code, reply.headers) == (500, "deadly_request", {"x-should-retry": "false"})


def test_newcomers_are_served_while_a_suspect_is_on_probation() -> None:
    async def scenario() -> None:
        async with connected(client_options=RECOVERS) as (client, engine):
            long = asyncio.create_task(tokens_of(client, [engine.stall_token] * 9, max_tokens=3))  # a long prefill
            await until(lambda: engine.submits)
            await engine.close()
            async with next_engine(client) as second:
                assert await tokens_of(client, [5, 6], max_tokens=3) == [5, 6, 5]
                second.stall_token = -1
                assert len(await long) == 3

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


def test_what_another_engine_could_do_is_tried_again() -> None:
    """Memory that the dead have not given back yet, say."""

    async def scenario() -> None:
        async with connected(client_options=RECOVERS) as (client, engine):
            request = asyncio.create_task(tokens_of(client, [5, 6], max_tokens=10_000))
            await until(lambda: len(engine.submits) == 1)
            await engine.close()
            await until(lambda: client.engine.state == "restarting")
            client.on_engine(EngineFailed("there is no memory", is_final=True))
            async with next_engine(client):
                assert client.engine.state == "ready"
            request.cancel()

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


def live_request(name: str, prompt_tokens: int, stream: OutputStream | None = None) -> LiveRequest:
    stream = stream or OutputStream(lambda *_: None, lambda *_: None, 1)
    times = RequestTimes(0.0, prompt_tokens)
    return LiveRequest(name, token_bytes([1] * prompt_tokens), SamplingParams(), stream, times)


class Trials:
    """Probation of requests at engines that are told what happens, each of another length."""

    def __init__(self, *sizes: int) -> None:
        self.probation = Probation()
        self.at_engine = [live_request(str(size), size) for size in sizes]

    def dies(self) -> str | None:
        """The engine dies, and another comes. Returns whose trial it was."""
        tried = self.probation.engine_lost(self.at_engine)
        self.at_engine = []
        return tried and tried.requests[0].request_id

    def given(self) -> list[str]:
        going = self.probation.next()
        self.at_engine += going
        for request in going:
            request.tokens_of_engine = 0
        return [request.request_id for request in going]

    def comes(self, size: int) -> list[str]:
        """A newcomer. Returns who is given to the engine for it."""
        newcomer = live_request(str(size), size)
        if self.probation.lets_in:
            self.at_engine.append(newcomer)
            return [newcomer.request_id]
        self.probation.hold(newcomer)
        return []

    def passes(self, *sizes: int) -> list[str]:
        """They have had two tokens. Returns who is given to the engine for it."""
        for request in self.at_engine:
            if int(request.request_id) in sizes:
                request.tokens_of_engine = 2
        return self.given()


def test_suspects_are_tried_in_turn_the_shortest_first_and_newcomers_beside_them() -> None:
    trials = Trials(30, 2, 9, 1)
    assert trials.dies() is None, "nobody was on trial"
    assert trials.given() == ["1"]
    assert trials.given() == []
    assert trials.comes(500) == ["500"]
    assert trials.passes(1) == ["2"]
    trials.at_engine[-1].tokens_of_engine = 1  # of its prefill
    assert trials.given() == []
    trials.at_engine[-1].has_ended = True
    assert trials.given() == ["9"]
    assert trials.passes(9) == ["30"]
    assert not trials.probation.is_over
    assert trials.passes(30) == []
    assert trials.probation.is_over


def test_who_was_on_trial_when_the_engine_died_is_tried_again_first_and_alone() -> None:
    trials = Trials(3, 8, 20)
    trials.dies()
    assert trials.given() == ["3"]
    assert trials.passes(3) == ["8"]
    assert trials.comes(1) == ["1"]
    assert trials.dies() == "8"
    assert trials.given() == ["8"]
    assert trials.comes(5) == []
    assert trials.passes(8) == ["1", "5"], "newcomers are let in beside the next suspect"
    assert trials.passes(1) == ["3"]
    assert trials.passes(3) == ["20"]


def test_two_trials_that_end_with_the_engine_are_blamed_on_the_request() -> None:
    trials = Trials(3)
    assert [trials.dies(), trials.given()] == [None, ["3"]]
    assert [trials.dies(), trials.given()] == ["3", ["3"]]
    trials.comes(4)
    tried = trials.probation.engine_lost(trials.at_engine)
    assert tried is not None
    assert tried.failed_trials == 2


def test_a_trial_that_was_passed_leaves_no_stain() -> None:
    trials = Trials(3)
    for _ in range(4):  # engines that die of something else
        trials.dies()
        assert trials.given() == ["3"]
        assert trials.dies() == "3"
        assert trials.given() == ["3"]
        assert trials.passes(3) == []


def test_a_deadly_newcomer_is_not_laid_to_the_suspect_beside_it() -> None:
    trials = Trials(900)
    trials.dies()
    assert trials.given() == ["900"]
    assert trials.comes(4) == ["4"]
    assert trials.dies() == "900", "it may have been that one"
    assert trials.given() == ["900"]
    assert trials.passes(900) == ["4"]
    assert trials.dies() == "4"
    assert trials.given() == ["4"]
    tried = trials.probation.engine_lost(trials.at_engine)
    assert tried is not None
    assert (tried.requests[0].request_id, tried.failed_trials) == ("4", 2)


def test_requests_of_one_stream_are_tried_as_one() -> None:
    probation = Probation()
    samples = [live_request("one", 4)]
    samples.append(live_request("two", 4, samples[0].stream))
    probation.engine_lost([live_request("other", 9), *samples])
    assert probation.next() == samples
    samples[0].tokens_of_engine = 2
    assert probation.next() == []
    samples[1].has_ended = True
    assert [request.request_id for request in probation.next()] == ["other"]


def test_words_of_a_dead_engine_reach_nobody() -> None:
    live = LiveRequests()
    request = live_request("short", 2)
    live.add(request)
    assert live.hand_over(request).request_id == "short"
    assert live.engine_lost() == [request]
    assert live.hand_over(request).request_id == "short~2"
    assert live.receive(TokenOutput("short", [4])) is None
    received = live.receive(TokenOutput("short~2", [4]))
    assert received is not None
    assert received[1].request_id == "short"
    assert (live.remove("short"), live.prompt_tokens) == ("short~2", 0)


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
    request = live_request("a", 3)
    live.add(request)
    live.hand_over(request)
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
    request = live_request("a", 11)
    live.add(request)
    live.hand_over(request)
    told: list[Logprobs] = []

    def hear(wire_id: str, first: int, last: int) -> None:
        received = live.receive(TokenOutput(wire_id, [], prompt_logprobs=part(first, last)))
        assert received is not None
        if received[1].prompt_logprobs is not None:
            told.append(received[1].prompt_logprobs)

    hear("a", 0, 4)
    live.engine_lost()
    live.hand_over(request)
    hear("a~2", 0, 3)
    hear("a~2", 3, 7)
    hear("a~2", 7, 10)
    assert [row.logprob for row in Logprobs.join(told).rows()] == list(range(10))
