"""Streams as servers really write them: cut anywhere, with comments, errors, and shapes of their own."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.loadtest.completion import CompletionStream
from leanserve.loadtest.events import StreamEvent, Usage, read_event
from leanserve.loadtest.http_stream import Exchange
from leanserve.loadtest.sse import SseParser

STREAM = (
    b": keep-alive\n\n"
    b'data: {"a": 1}\n\n'
    b'event: message\r\nid: 7\r\ndata: {"b":\r\ndata:  2}\r\n\r\n'
    b"data:no space\r\r"
    b": another comment\n"
    b"retry: 10\n\n"
    b'error: {"code":500,"message":"out of memory"}\n\n'
    b"data: [DONE]\n"
)
EVENTS = [
    b'{"a": 1}',
    b'{"b":\n 2}',
    b"no space",
    b'{"error":{"code":500,"message":"out of memory"}}',
    b"[DONE]",
]


def events_of(pieces: list[bytes]) -> list[bytes]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)] + parser.close()


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_where_the_network_cuts(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert events_of([STREAM[a:b] for a, b in pairwise(places)]) == EVENTS


def test_events_come_as_soon_as_they_are_complete() -> None:
    parser = SseParser()
    assert parser.feed(b"data: one\n") == []
    assert parser.feed(b"\ndata: two\n\n: x") == [b"one", b"two"]


def completion(**choice: object) -> bytes:
    return json.dumps({"id": "x", "choices": [{"index": 0, **choice}], "usage": None}).encode()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # vLLM and LeanServe: completions, with and without ids; a token may have no text yet
        (completion(text=" we", finish_reason=None), StreamEvent(text=" we")),
        (completion(text="", token_ids=[5, 6]), StreamEvent(token_ids=[5, 6])),
        (completion(text="", finish_reason="length"), StreamEvent(finish_reason="length")),
        # chat: a first chunk with the role alone, content, reasoning in two spellings, calls
        (completion(delta={"role": "assistant", "content": ""}), StreamEvent()),
        (completion(delta={"content": "yes"}), StreamEvent(text="yes")),
        (completion(delta={"content": None, "reasoning_content": "hm"}), StreamEvent(text="hm")),
        (completion(delta={"reasoning": "so"}), StreamEvent(text="so")),
        (completion(delta={"tool_calls": [{"function": {"arguments": "{}"}}]}), StreamEvent(text="{}")),
        (completion(delta={}, finish_reason="stop"), StreamEvent(finish_reason="stop")),
        # usage: a chunk of its own, details present, absent or null
        (
            b'{"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}}',
            StreamEvent(usage=Usage(9, 4, 8)),
        ),
        (
            b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": null}}',
            StreamEvent(usage=Usage(9, 4, None)),
        ),
        # llama.cpp's own shape
        (b'{"content": " we", "stop": false}', StreamEvent(text=" we")),
        (
            b'{"content": "", "stop": true, "stop_type": "limit", "tokens_predicted": 8, "tokens_evaluated": 3}',
            StreamEvent(finish_reason="length", usage=Usage(3, 8, None)),
        ),
        # TGI's own shape
        (
            b'{"index": 1, "token": {"id": 42, "text": " we"}, "generated_text": null, "details": null}',
            StreamEvent(text=" we", token_ids=[42]),
        ),
        (
            b'{"token": {"id": 2}, "details": {"finish_reason": "length", "generated_tokens": 2, "input_length": 7}}',
            StreamEvent(token_ids=[2], finish_reason="length", usage=Usage(7, 2, None)),
        ),
        # errors: OpenAI, TGI, vLLM before 0.10, FastAPI
        (b'{"error": {"message": "no room", "code": 503}}', StreamEvent(error="no room")),
        (
            b'{"error": "Input validation error", "error_type": "validation"}',
            StreamEvent(error="Input validation error"),
        ),
        (b'{"object": "error", "message": "too long", "code": 400}', StreamEvent(error="too long")),
        (b'{"detail": "Not Found"}', StreamEvent(error="Not Found")),
        (b"<html>", StreamEvent(error="not JSON: b'<html>'")),
        (b"[1]", StreamEvent(error="not an object: b'[1]'")),
    ],
)
def test_events_of_every_server_are_understood(data: bytes, expected: StreamEvent) -> None:
    assert read_event(data) == expected


@pytest.mark.parametrize(
    ("event", "tokens"),
    [(StreamEvent(text="two words"), 1), (StreamEvent(finish_reason="stop"), 0), (StreamEvent(token_ids=[1, 2, 3]), 3)],
)
def test_tokens_are_counted_by_ids_else_one_a_chunk_with_text(event: StreamEvent, tokens: int) -> None:
    assert event.tokens == tokens


def stream_of(*events: bytes, end: bytes = b"data: [DONE]\n\n") -> CompletionStream:
    stream = CompletionStream(Exchange(status=200), lambda arrived_ns, tokens, is_first: None)
    for number, event in enumerate(events):
        stream.add(1000 * number, b"data: " + event + b"\n\n")
    stream.add(1000 * len(events), end)
    stream.close()
    return stream


def test_a_trailing_chunk_without_a_token_is_no_gap() -> None:
    stream = stream_of(
        completion(delta={"role": "assistant"}),
        completion(delta={"content": "a"}),
        completion(delta={"content": "b"}),
        completion(delta={}, finish_reason="stop"),
        b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}',
    )
    assert list(stream.arrived_ns) == [1000, 2000]
    assert "".join(stream.texts) == "ab"
    assert stream.finish_reason == "stop"
    assert stream.usage == Usage(3, 2, None)
    assert stream.token_ids is None


def test_an_error_after_some_tokens_is_kept() -> None:
    stream = stream_of(completion(text="a"), b'{"error": {"message": "engine gone"}}')
    assert stream.error == "engine gone"
    assert stream.finish_reason is None
