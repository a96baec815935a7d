"""The edges of HTTP: routes and states, disconnects, slow readers, bodies and headers of the wrong size, the end."""

import asyncio
import contextlib
import gc
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from leanserve import __version__
from leanserve.contracts.errors import ConfigError
from leanserve.server.http_server import bind_socket
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer
from server.echo_engine import engine_info
from server.front_end import PATIENCE_S, Live, live_server, parse_events, run, until
from server.small_tokenizers import byte_level

SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
SMALL = b'{"prompt": [5], "max_tokens": 1}'
ENDLESS: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 4000, "stream": True}


def is_error(response: httpx.Response, status: int, code: str | None = None) -> bool:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return code is None or error["code"] == code


def test_small_routes() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            models = (await live.http.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == ["echo", "org/echo"]
            assert {model["max_model_len"] for model in models["data"]} == {4096}
            assert (await live.http.get("/v1/models/org/echo")).json()["id"] == "org/echo"
            assert (await live.http.get("/version")).json() == {"version": __version__}
            assert (await live.http.get("/ping")).status_code == 200
            assert (await live.http.get("/ready")).status_code == 200
            assert (await live.http.get("/health")).json()["status"] == "ok"
            assert is_error(await live.http.get("/v1/models/other"), 404, "model_not_found")
            assert is_error(await live.http.get("/v1/models/../../etc/passwd"), 404)
            assert is_error(await live.http.get("/nothing"), 404, "not_found")
            assert is_error(await live.http.get("/docs"), 404)
            wrong_method = await live.http.get("/v1/completions")
            assert is_error(wrong_method, 405, "method_not_allowed")
            assert wrong_method.headers["allow"] == "POST"
            for path in (
                "/health",
                "/ready",
                "/ping",
                "/version",
                "/metrics",
                "/",
                "/v1/models",
                "/v1/models/org/echo",
            ):
                asked, told = await live.http.head(path), await live.http.get(path)
                assert (asked.status_code, asked.content) == (200, b""), path
                assert asked.headers["content-type"] == told.headers["content-type"]
            assert (await live.http.head("/v1/models/other")).status_code == 404
            assert (await live.http.head("/v1/completions")).status_code == 405
            described = (await live.http.get("/openapi.json")).json()
            operation = described["paths"]["/v1/completions"]["post"]
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert "stop_token_ids" in schema["properties"]
            assert "$defs" not in json.dumps(described)
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}
            assert "422" not in json.dumps(described)

    run(scenario())


def test_while_loading_and_after_a_failure() -> None:
    async def scenario() -> None:
        async with live_server(None, ready=False) as live:
            await live.engine.load()
            await until(lambda: live.client.engine.loading is not None)
            assert (await live.http.get("/health")).json()["state"] == "loading"
            assert (await live.http.get("/v1/models")).json()["data"][0]["max_model_len"] is None
            for response in (await live.http.get("/ready"), await live.complete(prompt=[5])):
                assert is_error(response, 503, "overloaded")
                assert int(response.headers["retry-after"]) > 0
                assert "weights" in response.text
            await live.engine.fail("no memory")
            await until(lambda: live.client.engine.state == "failed")
            for path in ("/health", "/ready"):
                assert is_error(await live.http.get(path), 503, "engine_unavailable")
            assert is_error(await live.complete(prompt=[5]), 503, "engine_unavailable")

    run(scenario())


def test_health_sees_an_engine_that_owes_tokens_and_is_silent() -> None:
    async def scenario() -> None:
        async with live_server(None, client_options={"step_timeout_s": 0.1}) as live:
            await asyncio.sleep(0.15)
            assert (await live.http.get("/health")).status_code == 200
            live.engine.step_s = 30
            request = asyncio.create_task(live.complete(prompt=[5]))
            await until(lambda: live.client.silent_s > 0.1)
            assert "no progress" in (await live.http.get("/health")).text
            request.cancel()

    run(scenario())


def test_a_failing_engine_ends_streams_with_an_error_frame() -> None:
    async def scenario() -> None:
        async with live_server(None, pause_at_tokens=3) as live:
            whole = asyncio.create_task(live.complete(prompt=[5], max_tokens=100))
            streams = [asyncio.create_task(live.http.post("/v1/completions", json=ENDLESS)) for _ in range(5)]
            await until(lambda: live.client.statistics.generation_tokens == 6 * 3)
            live.engine.fail_after_steps = 0
            for response in await asyncio.gather(*streams):
                *chunks, last = parse_events(response.text)
                assert last["error"]["code"] == "engine_unavailable"
                assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
            assert is_error(await whole, 503, "engine_unavailable")

    run(scenario())


def test_stream_headers_and_request_ids() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            body = {"prompt": [5], "max_tokens": 2, "stream": True}
            response = await live.http.post("/v1/completions", json=body, headers={"X-Request-Id": "run-7.a:b_c"})
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-cache"
            assert response.headers["x-accel-buffering"] == "no"
            assert response.headers["x-request-id"] == "run-7.a:b_c"
            for bad in ("a b", "x" * 129, "é".encode(), "<script>"):
                response = await live.http.post("/v1/completions", json=body, headers={b"X-Request-Id": bad})  # type: ignore[dict-item]
                assert len(response.headers["x-request-id"]) == 32

    run(scenario())


def test_keep_alives_come_before_the_first_token() -> None:
    async def scenario() -> None:
        async with live_server(None, settings={"keep_alive_s": 0.05}) as live:
            body = {**ENDLESS, "prompt": [live.engine.stall_token]}
            async with live.http.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200
                seen = b""
                async for part in response.aiter_raw():
                    seen += part
                    if len(seen) > 40:
                        break
            assert seen.startswith(b": keep-alive\n\n: keep-alive\n\n")
            await live.quiet()
            assert list(live.engine.aborts.values()) == [1]

    run(scenario())


POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@contextlib.asynccontextmanager
async def sent(live: Live, data: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection with a small receive buffer, on which `data` has been sent."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", live.port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1 << 16)
    try:
        writer.write(data)
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def posted(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return POST + b"content-length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("phase", ["before a token", "between tokens"])
def test_a_disconnect_aborts_exactly_once(streamed: bool, phase: str) -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level()), step_s=0.005) as live:
            first = live.engine.stall_token if phase == "before a token" else 5
            body = {"prompt": [[first], [first, 6]], "max_tokens": 3000, "stream": streamed}
            for hard in (False, True):
                async with sent(live, posted(body)) as (_, writer):
                    await until(lambda: len(live.engine.running) == 2)
                    if phase == "between tokens":
                        before = live.client.statistics.generation_tokens
                        await until(lambda seen=before: live.client.statistics.generation_tokens > seen + 2)
                    if hard:
                        writer.transport.abort()
                await live.quiet()
            assert len(live.engine.submits) == 4
            assert sorted(live.engine.aborts.values()) == [1, 1, 1, 1]
            assert live.serving.counts.disconnects == {"queued" if phase == "before a token" else "decode": 2}

    run(scenario())


def test_a_disconnect_on_the_last_token_or_in_the_body_leaves_nothing() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            for i in range(40):
                body = {"prompt": [5], "max_tokens": 1 + i % 3, "stream": True}
                async with sent(live, posted(body)) as (reader, writer):
                    if i % 2:
                        await reader.readuntil(b"data: ")
                    writer.transport.abort()
            async with sent(live, POST + b"content-length: 99\r\n\r\n{"):
                await asyncio.sleep(0.05)
            await live.quiet()
            assert max(live.engine.aborts.values(), default=0) <= 1
            assert (await live.complete(prompt=[5])).status_code == 200

    run(scenario())


def test_a_client_that_stops_reading_is_bounded_and_told() -> None:
    async def scenario() -> None:
        info = engine_info(max_context_tokens=2_000_000)
        async with live_server(None, max_queued_tokens=500, tokens_per_output=200, step_s=0.002, info=info) as live:
            async with sent(live, posted({**ENDLESS, "max_tokens": 1_000_000})) as (reader, _):
                async with asyncio.timeout(PATIENCE_S):
                    while not live.engine.aborts:
                        await asyncio.sleep(0.02)
                        await live.chunks(prompt=[6], max_tokens=20)  # others go on
                assert live.client.live_requests == 0
                text = b""
                while not text.endswith(b"\r\n0\r\n\r\n"):
                    text = text[-1000:] + await reader.read(65536)
                assert b"at most 500 may wait" in text
                assert b"data: [DONE]\n\n" in text
            await live.quiet()
            assert list(live.engine.aborts.values()) == [1]

    run(scenario())


def test_a_taken_port_is_a_clear_error() -> None:
    first = bind_socket("127.0.0.1", 0)
    port = first.getsockname()[1]
    try:
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is taken.*--port"):
            bind_socket("127.0.0.1", port)
    finally:
        first.close()
    bind_socket("127.0.0.1", port).close()


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("203.0.113.7", 0, "not an address of this machine"),
        ("no such host", 80, "not an address"),
        ("127.0.0.1", 99999, "0 .* to 65535"),
    ],
)
def test_addresses_that_cannot_be(host: str, port: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        bind_socket(host, port)


def test_bodies_that_are_too_long_or_too_slow() -> None:
    async def scenario() -> None:
        slow = POST + b"content-length: 9\r\n\r\n{"
        async with live_server(None, settings={"body_timeout_s": 0.2}) as live, sent(live, slow) as (reader, _):
            assert b" 408 " in await reader.readline()
        async with live_server(None, max_queued_tokens=3000, settings={"max_body_bytes": 100_000}) as live:
            running = asyncio.create_task(live.chunks(prompt=[5], max_tokens=3000))

            async def parts(count: int) -> Any:
                for _ in range(count):
                    yield b" " * 10_000

            headers = {"content-type": "application/json"}
            declared = await live.http.post("/v1/completions", content=b" " * 200_000, headers=headers)
            chunked = await live.http.post("/v1/completions", content=parts(400), headers=headers)
            for response in (declared, chunked):
                assert is_error(response, 413, "request_too_large")
                assert "100000 bytes" in response.text
                assert response.headers["connection"] == "close"
            at_the_limit = json.dumps({"prompt": [5]}).encode().ljust(100_000)
            assert (await live.http.post("/v1/completions", content=at_the_limit, headers=headers)).status_code == 200
            async with sent(live, POST + b"content-length: 99999999999999999999\r\n\r\n") as (reader, _):
                assert b" 413 " in await reader.readline()
            assert len(await running) == 3000

    run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nlong: " + b"a" * 3_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello over TLS\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        POST + b"content-length: 2\r\ncontent-length: 44\r\n\r\n{}" + SMUGGLED,
        POST + b"content-length: 44\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
        POST + b"content-length: +2\r\n\r\n{}" + SMUGGLED,
        POST + b"transfer-encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
        POST + b"transfer-encoding : chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
        POST + b"x: a\rcontent-length: 0\r\ncontent-length: 2\r\n\r\n{}" + SMUGGLED,
        b"GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n" + SMUGGLED,
    ],
    ids=[
        *("a long header", "many headers", "a long path", "tls", "no host", "a bad chunk"),
        *("two lengths", "a length and chunks", "a signed length", "an unknown coding", "a space before the colon"),
        *("a bare CR", "two hosts"),
    ],
)
def test_what_is_not_http_is_refused_in_our_words(data: bytes) -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            answer = b""
            async with sent(live, data) as (reader, _):
                with contextlib.suppress(ConnectionError):  # it was still sending
                    async with asyncio.timeout(PATIENCE_S):
                        answer = await reader.read()
            if len(data) < 200_000 or answer:
                assert answer.startswith(b"HTTP/1.1 400 ")
                assert answer.count(b"HTTP/1.1 ") == 1  # what came behind is not taken for a request
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
            assert (await live.http.get("/health")).status_code == 200

    run(scenario())


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://any.example:80/v1/models/org%2Fecho?x=http://y/z", 200),
        ("HTTP://x", 200),
        ("http://x?y=/ping", 200),
        ("http://x/v1/none", 404),
        ("ftp://x/ping", 404),
    ],
)
def test_a_target_may_name_the_host(target: str, status: int) -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            request = f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
            async with sent(live, request) as (reader, _):
                assert (await reader.read()).split()[1] == str(status).encode()

    run(scenario())


def test_trailers_and_extensions_of_chunks_are_read_over() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            body = b"%x;name=value\r\n%s\r\n0\r\nauthorization: Bearer x\r\ncontent-length: 3\r\n\r\n"
            chunked = POST + b"transfer-encoding: chunked\r\n\r\n" + body % (len(SMALL), SMALL)
            async with sent(live, chunked + b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") as (
                reader,
                _,
            ):
                answers = await reader.read()
            assert answers.count(b"HTTP/1.1 200 OK") == 2

    run(scenario())


def test_the_head_of_a_request_may_not_take_for_ever() -> None:
    """The first on a connection, and a later one; bytes that trickle in win no time."""

    async def trickle(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"a: b\r\n")
                await writer.drain()
                await asyncio.sleep(0.05)

    async def scenario() -> None:
        async with live_server(None, settings={"body_timeout_s": 0.4}) as live:
            for before in (b"", b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n"):
                async with sent(live, before) as (reader, writer):
                    if before:
                        assert b" 200 " in await reader.readline()
                        await reader.readuntil(b"{}")
                    writer.write(b"GET /ping HTTP/1.1\r\n")
                    slow = asyncio.create_task(trickle(writer))
                    answer = await asyncio.wait_for(reader.read(), 10)
                    slow.cancel()
                    assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
                    assert b"0.4 s" in answer
                    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
            async with sent(live, b"") as (reader, _):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            streamed = await live.chunks(prompt=[5], max_tokens=500, ignore_eos=True)  # an answer may take longer
            assert len(streamed) == 500

    run(scenario())


def test_without_a_free_file_clients_wait_and_the_log_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            assert (await live.http.get("/ping")).status_code == 200  # what is imported when it is needed is, then
            waiting = socket.create_connection(("127.0.0.1", live.port))  # nobody has accepted it yet
            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest_free = os.dup(waiting.fileno())
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
            try:
                await until(lambda: caplog.records)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            reader, writer = await asyncio.open_connection(sock=waiting)
            writer.write(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 200 " in await asyncio.wait_for(reader.readline(), PATIENCE_S)
            writer.close()

    run(scenario())
    (said,) = [record.getMessage() for record in caplog.records if record.name == "leanserve.server"]
    assert "Too many open files" in said
    assert "ulimit -n" in said


def test_a_full_server_says_so() -> None:
    async def scenario() -> None:
        async with live_server(None, settings={"max_live_requests": 3}) as live:
            stalled = asyncio.create_task(live.complete(prompt=[[live.engine.stall_token]] * 2))
            await until(lambda: live.client.live_requests == 2)
            assert (await live.complete(prompt=[5])).status_code == 200
            refused = await live.complete(prompt=[[5], [6]])
            assert is_error(refused, 503, "overloaded")
            assert "the limit is 3" in refused.text
            stalled.cancel()
            await live.quiet()
            assert (await live.complete(prompt=[[5], [6]])).status_code == 200

    run(scenario())


def test_nothing_is_kept_of_requests_that_ended() -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level())) as live:

            async def rounds(count: int) -> int:
                for i in range(count):
                    await live.complete(prompt="The cat", max_tokens=2, stop="never")
                    await live.chunks(prompt=[5], max_tokens=2)
                    if i % 10 == 0:
                        await live.complete(prompt=[5], temperature=7)
                        await live.complete(prompt=[live.engine.error_token])
                await live.quiet()
                live.engine.submits.clear()
                gc.collect()
                return len(gc.get_objects())

            before = await rounds(50)
            after = await rounds(100)
            assert after - before < 200, f"{after - before} objects more after 220 requests"

    run(scenario())


def test_draining_lets_live_requests_finish_and_nobody_in() -> None:
    async def scenario() -> None:
        async with live_server(None, pause_at_tokens=5, grace_s=4 * PATIENCE_S) as live:
            running = asyncio.create_task(live.chunks(prompt=[5], max_tokens=40))
            await until(lambda: live.client.statistics.generation_tokens == 5)
            live.stop.set()
            await until(lambda: live.serving.is_draining)
            assert is_error(await live.http.get("/ready"), 503)
            refused = await live.complete(prompt=[5])
            assert is_error(refused, 503, "overloaded")
            assert (await live.http.get("/health")).status_code == 200
            live.engine.pause_at_tokens = None
            assert (await running)[-1]["choices"][0]["finish_reason"] == "length"
            async with asyncio.timeout(PATIENCE_S):  # well before the grace is over
                await live.served

    run(scenario())


def test_draining_waits_for_a_client_that_has_not_read_all_of_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than sockets hold: the engine is done long before the client is."""
    monkeypatch.setattr("leanserve.server.http_server._CLOSE_S", 0.05)

    async def scenario() -> None:
        async with live_server(None, tokens_per_output=500, max_queued_tokens=10_000, grace_s=PATIENCE_S) as live:
            body = {**ENDLESS, "max_tokens": 4000, "logprobs": 20, "return_tokens_as_token_ids": True}
            async with sent(live, posted(body)) as (reader, _):
                await until(lambda: live.engine.submits and not live.client.live_requests)
                live.stop.set()
                await until(lambda: live.serving.is_draining)
                await asyncio.sleep(0.2)
                text = await reader.read()
            assert text.count(b'"finish_reason":"length"') == 1
            assert b"data: [DONE]\n\n" in text

    run(scenario())


def test_draining_ends_in_bounded_time_and_says_so() -> None:
    async def scenario() -> None:
        async with live_server(None, pause_at_tokens=5, grace_s=0.2) as live:
            streamed = asyncio.create_task(live.http.post("/v1/completions", json=ENDLESS))
            whole = asyncio.create_task(live.complete(prompt=[live.engine.stall_token]))
            async with sent(live, b"GET /health") as (stuck, _):
                await until(lambda: live.client.live_requests == 2 and live.client.statistics.generation_tokens == 5)
                live.stop.set()
                async with asyncio.timeout(PATIENCE_S):
                    await live.served
                assert await stuck.read() == b""
            assert "shutting down" in parse_events((await streamed).text)[-1]["error"]["message"]
            assert is_error(await whole, 503)
            await until(lambda: not live.engine.running)
            assert sorted(live.engine.aborts.values()) == [1, 1]
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", live.port), timeout=1)

    run(scenario())


def test_neither_prompts_nor_tokens_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level())) as live:
            await live.complete(prompt="a very secret prompt", max_tokens=3)
            await live.complete(prompt="a very secret prompt", temperature=9)
            await live.chunks(prompt=[301, 302, 303], max_tokens=3)
            await live.http.get("/x%0d%0ainjected: line?prompt=secret")

            def broken(texts: list[str], **_: object) -> list[list[int]]:
                raise RuntimeError(texts[0])

            live.serving.prompts.tokenizer.encode_batch = broken  # type: ignore[union-attr, method-assign]
            response = await live.complete(prompt="a very secret prompt")
            assert is_error(response, 500, "internal")
            assert "secret" not in response.text

    with caplog.at_level("DEBUG"):
        run(scenario())
    log = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("leanserve", "uvicorn"))
    )
    assert '"path":"/v1/completions","status":200' in log
    assert "unexpected RuntimeError" in log
    for word in ("secret", "301, 302", "\r", "\ninjected"):
        assert word not in log, word


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="model names"):
        ServerSettings(model_names=())
    with pytest.raises(ConfigError, match="max_prompts"):
        ServerSettings(model_names=("m",), max_prompts=0)


def test_a_live_front_end_has_no_torch() -> None:
    script = """
import asyncio, sys
from server.echo_engine import engine_info
from server.front_end import live_server
from server.small_tokenizers import byte_level
from leanserve.server.tokenizer import Tokenizer

async def main():
    async with live_server(Tokenizer(byte_level())) as live:
        assert (await live.complete(prompt="The cat", max_tokens=5)).status_code == 200
        assert len(await live.chunks(prompt="The cat", max_tokens=5)) == 5

asyncio.run(main())
heavy = {"torch", "triton", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
