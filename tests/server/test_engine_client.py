"""Requests over the socket: each ends exactly once, whatever happens to it or to the engine."""

import asyncio
import tempfile
from array import array

import pytest

from leanserve.contracts.errors import EngineError, OverloadedError
from leanserve.contracts.messages import TokenOutput, TokenOutputs, encode
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.engine_client import EngineClient, token_bytes
from server.echo_engine import engine_info
from server.front_end import connected, run, until

ENDLESS = SamplingParams(max_tokens=1_000_000)


async def outputs_of(client: EngineClient, prompt: list[int], max_tokens: int) -> list[TokenOutput]:
    return [output async for output in client.generate(prompt, SamplingParams(max_tokens=max_tokens))]


def test_tokens_come_in_order_and_end_once() -> None:
    async def scenario() -> None:
        async with connected() as (client, engine):
            assert (client.engine.state, client.engine.info) == ("ready", engine.info)
            outputs = await outputs_of(client, [5, 6, 11], 7)
            assert [t for output in outputs for t in output.token_ids] == [5, 6, 11, 5, 6, 11, 5]
            assert [output.finish_reason for output in outputs] == [None] * 6 + ["length"]
            assert array("i", engine.submits[0].prompt_token_ids).tolist() == [5, 6, 11]
            assert (client.live_requests, client.silent_s, engine.aborts) == (0, 0.0, {})
            assert client.engine.load.step == engine.steps
            assert client.engine.load.pages_used_per_rank == (0,)

    run(scenario())


def test_leaving_early_aborts_exactly_once() -> None:
    async def scenario() -> None:
        async with connected(step_s=0.002) as (client, engine):
            outputs = client.generate([5], ENDLESS, request_id="left")
            async for output in outputs:
                assert output.token_ids == [5]
                break
            assert client.live_requests == 1
            await outputs.aclose()  # type: ignore[attr-defined]
            await outputs.aclose()  # type: ignore[attr-defined]
            task = asyncio.create_task(outputs_of(client, [engine.stall_token], 5))
            await until(lambda: len(engine.submits) == 2)
            task.cancel()
            await until(lambda: not engine.running)
            await asyncio.sleep(0.05)  # for an abort too many
            assert sorted(engine.aborts.values()) == [1, 1]
            assert engine.aborts["left"] == 1
            assert (client.live_requests, engine.running) == (0, {})

    run(scenario())


def test_a_request_that_ended_is_not_aborted() -> None:
    async def scenario() -> None:
        async with connected() as (client, engine):
            stream = client.open_stream()
            stream.submit("r", token_bytes([5]), SamplingParams(max_tokens=1))
            await until(lambda: not client.live_requests)  # the end has come, and nobody has read it
            stream.abort()
            await asyncio.sleep(0.05)
            assert stream.finished
            assert engine.aborts == {}

    run(scenario())


def test_several_requests_share_a_stream() -> None:
    async def scenario() -> None:
        async with connected() as (client, engine):
            stream = client.open_stream()
            stream.submit("a", token_bytes([5]), SamplingParams(max_tokens=3))
            stream.submit("b", token_bytes([6]), SamplingParams(max_tokens=5))
            stream.submit("c", token_bytes([6]), ENDLESS)
            got: dict[str, int] = {"a": 0, "b": 0, "c": 0}
            while not stream.finished:
                output = await stream.next()
                assert output is not None
                got[output.request_id] += len(output.token_ids)
                if got["c"] == 4:
                    stream.abort("c")
            assert (got["a"], got["b"]) == (3, 5)
            await until(lambda: engine.aborts)
            assert engine.aborts == {"c": 1}

    run(scenario())


def test_silence_is_told_apart_from_an_end() -> None:
    async def scenario() -> None:
        async with connected() as (client, engine):
            stream = client.open_stream()
            stream.submit("r", token_bytes([engine.stall_token]), ENDLESS)
            assert await stream.next(0.02) is None
            assert not stream.finished
            stream.abort()
            assert stream.finished

    run(scenario())


def test_before_it_is_ready_and_after_it_failed() -> None:
    async def scenario() -> None:
        async with connected(ready=False) as (client, engine):
            with pytest.raises(OverloadedError, match="loading"):
                await outputs_of(client, [5], 1)
            await engine.load()
            await until(lambda: client.engine.loading is not None)
            with pytest.raises(OverloadedError, match="weights, 1 of 2"):
                await outputs_of(client, [5], 1)
            waiting = asyncio.create_task(client.engine.wait_ready())
            await engine.fail("out of memory\nTraceback: secret")
            with pytest.raises(EngineError, match="out of memory"):
                await waiting
            with pytest.raises(EngineError, match="out of memory") as caught:
                await outputs_of(client, [5], 1)
            assert "secret" not in str(caught.value)

    run(scenario())


def test_a_request_that_comes_when_the_engine_has_just_gone_may_come_again() -> None:
    async def scenario() -> None:
        with tempfile.TemporaryDirectory(prefix="ls-") as directory:
            client = EngineClient(f"ipc://{directory}/engine")
            client.start()
            client.engine.attach()
            client.engine.note_ready(engine_info())
            with pytest.raises(OverloadedError, match="not connected"):
                await outputs_of(client, [5], 1)
            assert client.live_requests == 0
            await client.close()

    run(scenario())


def test_a_failing_engine_ends_each_request_once() -> None:
    async def scenario() -> None:
        async with connected(fail_after_steps=3, step_s=0.01) as (client, _):
            ended: list[str] = []

            async def consume(name: str) -> None:
                try:
                    async for _ in client.generate([5], ENDLESS, request_id=name):
                        pass
                except EngineError:
                    ended.append(name)

            await asyncio.gather(*(consume(f"r{i}") for i in range(20)))
            assert sorted(ended) == sorted(f"r{i}" for i in range(20))
            assert (client.engine.state, client.live_requests) == ("failed", 0)
            client.fail("said again")
            assert client.engine.failure == "it was told to"

    run(scenario())


def test_an_engine_that_vanishes_is_noticed_and_another_takes_over() -> None:
    async def scenario() -> None:
        from server.echo_engine import EchoEngine

        async with connected(step_s=0.005) as (client, engine):
            request = asyncio.create_task(outputs_of(client, [5], 1_000_000))
            await until(lambda: engine.submits)
            await engine.close()
            with pytest.raises(EngineError, match="connection closed"):
                await request
            assert client.engine.state == "failed"
            another = EchoEngine(client.address)
            try:
                await another.load()
                await another.ready()
                await until(lambda: client.engine.state == "ready")
                await client.engine.wait_ready()
                assert len(await outputs_of(client, [5, 6], 4)) == 4
            finally:
                await another.close()

    run(scenario())


def test_an_error_of_one_request_leaves_the_others() -> None:
    async def scenario() -> None:
        async with connected() as (client, engine):
            bad = asyncio.create_task(outputs_of(client, [engine.error_token], 9))
            good = asyncio.create_task(outputs_of(client, [5], 9))
            with pytest.raises(EngineError, match="odd case"):
                await bad
            assert len(await good) == 9
            assert client.engine.state == "ready"

    run(scenario())


def test_a_slow_reader_is_bounded() -> None:
    async def scenario() -> None:
        async with connected(max_queued_tokens=50) as (client, engine):
            stream = client.open_stream()
            stream.submit("slow", token_bytes([5]), ENDLESS)
            await until(lambda: engine.aborts)
            with pytest.raises(OverloadedError, match="at most 50"):  # unread tokens are dropped
                await stream.next()
            assert stream.finished
            assert engine.aborts == {"slow": 1}

    run(scenario())


def test_a_burst_of_steps_leaves_a_reader_its_turns() -> None:
    """They may have gathered while the loop was busy: that is no fault of the reader's."""

    async def scenario() -> None:
        async with connected(max_queued_tokens=50) as (client, engine):
            stream = client.open_stream()
            stream.submit("r", token_bytes([engine.stall_token]), ENDLESS)
            await until(lambda: engine.submits)
            for number in range(500):  # none of these waits
                await engine.send_raw(encode(TokenOutputs(number, [TokenOutput("r", [number])], 1, 0, (1,), 0)))
            received = [token for _ in range(500) if (output := await stream.next()) for token in output.token_ids]
            assert received == list(range(500))
            stream.abort()

    run(scenario())


def test_a_message_that_cannot_be_read_is_a_failure_and_not_a_hang() -> None:
    async def scenario() -> None:
        async with connected() as (client, engine):
            await engine.send_raw(b"\xc1nonsense")
            await until(lambda: client.engine.state == "failed")

    run(scenario())


def test_what_another_engine_would_need_is_kept() -> None:
    async def scenario() -> None:
        async with connected(step_s=0.005) as (client, _):
            stream = client.open_stream()
            stream.submit("r", token_bytes([5, 6]), ENDLESS)
            received = [token for _ in range(5) if (output := await stream.next()) for token in output.token_ids]
            kept = client.live.get("r")
            assert kept is not None
            assert kept.prompt_token_ids == token_bytes([5, 6])
            assert kept.output_token_ids[:5].tolist() == received
            stream.abort()

    run(scenario())


def test_shutdown_reaches_the_engine_even_when_the_client_closes_at_once() -> None:
    async def scenario() -> None:
        async with connected() as (client, engine):
            client.shut_down_engine()
            await client.close()
            await until(lambda: engine.shutdowns == 1)

    run(scenario())


def test_a_listener_that_breaks_ends_requests_with_the_reason(monkeypatch) -> None:
    """Otherwise nobody would hear the engine any more, and every stream would wait for ever."""

    async def scenario() -> None:
        async with connected() as (client, _):
            stream = client.open_stream()

            def broken(message: TokenOutputs) -> None:
                raise KeyError("a prompt")

            monkeypatch.setattr(client._broker, "deliver", broken)
            stream.submit("r", token_bytes([5]), ENDLESS)
            with pytest.raises(EngineError, match=r"task 'engine outputs' broke: KeyError$"):
                await asyncio.wait_for(stream.next(), 60)
            assert client.engine.state == "failed"

    run(scenario())
