"""Spans: one for each request and one for each thing it waited for, whatever becomes of it; never a word of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from leanserve.server.auth import key_digests
from leanserve.server.engine_client import Recovery
from leanserve.server.tokenizer import Tokenizer
from leanserve.server.tracing import Tracing
from server.echo_engine import EchoEngine
from server.front_end import Live, live_server, run
from server.small_tokenizers import byte_level
from server.test_http import posted, sent
from server.test_recovery import until

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Traced:
    """Spans of a server, for when it has ended."""

    exporter: InMemorySpanExporter

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def of(self, request_id: str) -> ReadableSpan:
        (found,) = [s for s in self.spans if s.attributes and s.attributes.get("leanserve.request_id") == request_id]
        return found

    def below(self, span: ReadableSpan) -> list[ReadableSpan]:
        return [s for s in self.spans if s.parent is not None and s.parent.span_id == span.context.span_id]


@contextlib.asynccontextmanager
async def traced_server(traced: Traced, *arguments: Any, **options: Any) -> AsyncIterator[Live]:
    tracing = Tracing(traced.exporter)
    try:
        async with live_server(*arguments, tracing=tracing, **options) as live:
            yield live
    finally:
        tracing.close()


@pytest.fixture
def traced() -> Traced:
    return Traced(InMemorySpanExporter())


async def post(live: Live, request_id: str, path: str = "/v1/completions", **body: Any) -> int:
    headers = {"X-Request-Id": request_id, "traceparent": f"00-{TRACE}-{SPAN}-01"}
    return (await live.http.post(path, json=body, headers=headers)).status_code


def test_a_generation_is_a_span_with_its_phases(traced: Traced) -> None:
    async def scenario() -> None:
        async with traced_server(traced, None) as live:
            assert await post(live, "r", prompt=[5, 6, 11, 12], max_tokens=3, stream=True, top_k=4, seed=7) == 200

    run(scenario())
    span = traced.of("r")
    assert (span.name, span.kind, span.status.status_code) == (
        "POST /v1/completions",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    assert span.parent is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
    assert span.resource.attributes["service.name"] == "leanserve"
    told = dict(span.attributes or {})
    assert told.pop("gen_ai.response.id", "").startswith("cmpl-")
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") * 1e9 < span.end_time - span.start_time
    assert told == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/completions",
        "client.address": "127.0.0.1",
        "leanserve.request_id": "r",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "leanserve",
        "gen_ai.request.model": "echo",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 4.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.response.model": "echo",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
    }
    phases = traced.below(span)
    assert [phase.name for phase in phases] == ["prepare", "queue", "prefill", "decode"]
    assert [dict(phase.attributes or {}) for phase in phases[2:]] == [
        {"leanserve.prompt_tokens": 4},
        {"leanserve.output_tokens": 3},
    ]
    moments = [span.start_time, *(phase.end_time for phase in phases), span.end_time]
    assert moments == sorted(moments)
    assert [phase.start_time for phase in phases] == moments[: len(phases)], "each begins where the one before ends"


def test_choices_have_phases_of_their_own_and_nothing_said_is_in_a_span(traced: Traced) -> None:
    async def scenario() -> None:
        tokenizer, template = Tokenizer(byte_level()), "{% for m in messages %}{{ m.content }}{% endfor %}"
        async with traced_server(traced, tokenizer, chat_template=template) as live:
            messages = [{"role": "user", "content": "sesame"}]
            options: dict[str, Any] = {"n": 2, "max_tokens": 6, "stop": ["never-said"], "user": "ali-baba"}
            assert await post(live, "r", "/v1/chat/completions", messages=messages, **options) == 200
            many = [[5, 6]] * 20
            assert await post(live, "many", prompt=many, max_tokens=1) == 200

    run(scenario())
    span = traced.of("r")
    told = dict(span.attributes or {})
    assert (told["gen_ai.operation.name"], told["gen_ai.request.choice.count"]) == ("chat", 2)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (6, 12)
    assert "gen_ai.response.time_to_first_chunk" not in told, "there was no stream"
    choices = [(phase.name, (phase.attributes or {}).get("leanserve.choice.index")) for phase in traced.below(span)]
    assert choices == [
        ("prepare", None),
        *((name, choice) for choice in (0, 1) for name in ("queue", "prefill", "decode")),
    ]
    everything = "".join(s.to_json() for s in traced.spans)
    assert not [word for word in ("sesame", "never-said", "ali-baba") if word in everything]
    many = traced.of("many")
    assert len(traced.below(many)) == 1 + 3 * 16, "of so many choices the first ones"
    assert "gen_ai.request.choice.count" not in (many.attributes or {}), "each prompt has one"


def test_failures_say_what_they_were_and_whose(traced: Traced) -> None:
    async def scenario() -> None:
        settings = {"key_digests": key_digests(["a-key-for-tests"])}
        async with traced_server(traced, None, settings=settings) as live:
            assert await post(live, "keyless", prompt=[5]) == 401
            live.http.headers["Authorization"] = "Bearer a-key-for-tests"
            assert await post(live, "wrong", prompt=[5], temperature=9) == 400
            assert await post(live, "nowhere", "/v1/" + "x" * 300) == 404
            assert await post(live, "failed", prompt=[live.engine.error_token], max_tokens=5) == 503
            assert await post(live, "cut", prompt=[live.engine.error_token], max_tokens=5, stream=True) == 200
            for path in ("/health", "/ready", "/ping", "/metrics"):
                await live.http.get(path)

    run(scenario())
    found = {}
    for name in ("keyless", "wrong", "nowhere", "failed", "cut"):
        span = traced.of(name)
        told = span.attributes or {}
        phases = [phase.name for phase in traced.below(span)]
        found[name] = (told["http.response.status_code"], told["error.type"], span.status.status_code.name, phases)
    decoded = ["prepare", "queue", "prefill", "decode"]
    assert found == {
        "keyless": (401, "invalid_api_key", "UNSET", []),
        "wrong": (400, "invalid_value", "UNSET", []),
        "nowhere": (404, "not_found", "UNSET", []),
        "failed": (503, "engine_unavailable", "ERROR", decoded),
        "cut": (200, "engine_unavailable", "ERROR", decoded),
    }
    assert traced.of("failed").status.description == "the request hit an odd case"
    assert traced.of("keyless").name == traced.of("nowhere").name == "POST"
    assert len((traced.of("nowhere").attributes or {})["url.path"]) == 200
    assert len([span for span in traced.spans if span.kind is SpanKind.SERVER]) == 5, "probes are not traced"


def test_a_request_that_never_began_has_waited_to_its_end(traced: Traced) -> None:
    async def scenario() -> None:
        async with traced_server(traced, None, settings={"request_timeout_s": 0.1}) as live:
            assert await post(live, "late", prompt=[live.engine.stall_token]) == 408

    run(scenario())
    span = traced.of("late")
    assert (span.attributes or {})["error.type"] == "total_timeout"
    prepare, queue = traced.below(span)
    assert (prepare.name, queue.name, queue.end_time) == ("prepare", "queue", span.end_time)
    assert queue.end_time - queue.start_time >= 0.1e9


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves(traced: Traced, streamed: bool) -> None:
    async def scenario() -> None:
        async with traced_server(traced, None, step_s=0.002) as live:
            body = {"prompt": [5], "max_tokens": 4000, "stream": streamed}
            async with sent(live, posted(body)):
                await until(lambda: any(len(request.output_token_ids) > 2 for request in live.client.live))
            await live.quiet()

    run(scenario())
    (span,) = [span for span in traced.spans if span.kind is SpanKind.SERVER]
    told = dict(span.attributes or {})
    assert span.status.status_code is StatusCode.ERROR
    assert (told["error.type"], told["leanserve.disconnect.phase"]) == ("client_disconnected", "decode")
    assert told.get("http.response.status_code") == (200 if streamed else None)
    assert told["gen_ai.response.finish_reasons"] == ()
    assert [phase.name for phase in traced.below(span)] == ["prepare", "queue", "prefill", "decode"]


def test_a_request_that_outlives_its_engine_tells_of_it(traced: Traced) -> None:
    async def scenario() -> None:
        options = {"recovery": Recovery(max_restarts=1)}
        async with traced_server(traced, None, step_s=0.002, client_options=options) as live:
            request = asyncio.create_task(post(live, "r", prompt=[5, 6], max_tokens=40))
            await until(lambda: any(len(request.output_token_ids) > 2 for request in live.client.live))
            await live.engine.close()
            await until(lambda: live.client.engine.state == "restarting")
            second = EchoEngine(live.client.address)
            await second.ready()
            assert await request == 200
            await second.close()

    run(scenario())
    span = traced.of("r")
    assert span.status.status_code is StatusCode.UNSET
    told = dict(span.attributes or {})
    assert (told["leanserve.engine_restarts"], told["gen_ai.usage.output_tokens"]) == (1, 40)
    events = list(span.events)
    assert [event.name for event in events] == ["leanserve.engine_lost", "leanserve.resumed"]
    decode = traced.below(span)[-1]
    assert decode.start_time < events[0].timestamp < events[1].timestamp < decode.end_time


def test_a_parent_that_is_not_sampled_or_not_one_is_respected(traced: Traced) -> None:
    async def scenario() -> None:
        async with traced_server(traced, None) as live:
            for name, parents in (
                ("unsampled", [f"00-{TRACE}-{SPAN}-00"]),
                ("nonsense", ["00-zz"]),
                ("two", [f"00-{TRACE}-{SPAN}-01"] * 2),
                ("none", []),
            ):
                headers = [("X-Request-Id", name), *(("traceparent", parent) for parent in parents)]
                body = {"prompt": [5], "max_tokens": 1}
                assert (await live.http.post("/v1/completions", json=body, headers=headers)).status_code == 200

    run(scenario())
    roots = {(s.attributes or {}).get("leanserve.request_id"): s for s in traced.spans if s.kind is SpanKind.SERVER}
    assert {name: span.parent for name, span in roots.items()} == {"nonsense": None, "two": None, "none": None}
    assert len({span.context.trace_id for span in roots.values()}) == 3
