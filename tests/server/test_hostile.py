"""More than two hundred bodies and headers made to hurt: the right 4xx, soon, while a stream goes on undisturbed."""

import contextlib
import json
import time
from typing import Any

import psutil

from leanserve.server.tokenizer import Tokenizer
from server.chat_templates import HERMES
from server.echo_engine import engine_info
from server.front_end import Live, live_server, run
from server.small_tokenizers import byte_level
from server.test_bad_input import undisturbed_stream
from server.test_http import sent

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 5000, "0x10", "01", '"3"', "true", "[]", "{}"]
NUMERIC = ["max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "presence_penalty"]
SWITCHES = ["stream", "ignore_eos", "return_progress", "add_special_tokens", "include_stop_str_in_output"]
DEEP = "[" * 20_000
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def bodies() -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []

    def add(path: str, text: str | bytes) -> None:
        found.append((path, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")))

    for path, own in ((TEXT, '"prompt": [5]'), (CHAT, '"messages": [{"role": "user", "content": "x"}]')):
        for name in NUMERIC:
            for value in NUMBERS:
                add(path, f'{{{own}, "{name}": {value}}}')
        for name in SWITCHES:
            for value in ("1", '"true"', "[]"):
                add(path, f'{{{own}, "{name}": {value}}}')
        for name, values in {
            "n": [10**9, 0, -1, 129],
            "logprobs": [10**9, -1, "yes"],
            "top_logprobs": [10**9, -1],
            "stop": [["x"] * 1000, ["y" * 100_000], "", [""], [[]], {}],
            "stop_token_ids": [[-1], [10**30], [5] * 100_000, ["5"]],
            "logit_bias": [
                {"x": 1},
                {"5": "1"},
                {"5": 1e6},
                {"-1": 1},
                {"9" * 50: 1},
                {str(i): 1 for i in range(5000)},
            ],
            "response_format": [
                {"type": "json_schema"},
                {"type": "xml"},
                [],
                "json",
                {"type": "json_schema", "json_schema": 3},
            ],
            "structured_outputs": [{}, {"regex": "("}, {"json": {}, "regex": "x"}, {"regex": "x" * 200_000}, {"no": 1}],
            "stream_options": [{"include_usage": 1}, []],
            "model": [3, "../../etc/passwd", "x" * 100_000],
            "user": [{}],
            "cache_salt": ["", "x" * 10_000],
            "truncate_prompt_tokens": [0, -5, "1"],
        }.items():
            for value in values:
                add(path, f"{{{own}, {json.dumps(name)}: {json.dumps(value)}}}")
        add(path, f'{{{own}, "x": {DEEP}}}')
        add(path, f'{{{own}, "x": {DEEP}{"]" * 20_000}}}')
        add(path, DEEP)
        add(path, '{"a":' * 20_000)
        add(path, f'{{{own}, "user": "\\ud800"}}')
        add(path, f'{{{own}, "user": "\ud800"}}')
        add(path, f"{{{own}".encode() + b', "user": "\xff\xfe"}')
        add(path, "")
        add(path, "null")
        add(path, f"[{{{own}}}]")
        add(path, b"\xef\xbb\xbf{}")
        add(path, b"\x00" * 1000)
        add(path, f"{{{own}}}{{{own}}}")
    for prompt in (
        "[" + "-1," * 200_000 + "-1]",
        "[" + '"x",5,' * 200_000 + "5]",
        "[" + "1.5," * 200_000 + "5]",
        "[" + "[]," * 1000 + "[5]]",
        "[" + "[5]," * 1000 + "[5]]",
        "[" + "99999999999999999999," * 50_000 + "5]",
        "[" + "5," * 900_000 + "512]",
        "[" + "5," * 900_000 + "]",
        "[[5], 5]",
        '{"text": "x"}',
        "5",
        '""',
        "[]",
        "[[]]",
    ):
        add(TEXT, f'{{"prompt": {prompt}}}')
    for messages in (
        [{"role": "user", "content": "x"}] * 5000,
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 5000}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}],
        [{"role": "tool", "content": None}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
        ["x"],
        "x",
        {},
    ):
        add(CHAT, json.dumps({"messages": messages}))
    for fields in (
        {"chat_template": "{{ cycler.__init__.__globals__.os.system('id') }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": {"messages": "x"}},
        {"chat_template_kwargs": {"enable_thinking": {"a": 1}}},
        {"documents": [{"text": "x"}]},
        {"tools": [TOOL] * 200},
        {"tools": [{"type": "function", "function": {"name": "../f"}}]},
        {"tools": [{"type": "code_interpreter"}]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        {"tools": [TOOL], "tool_choice": 3},
        {
            "tools": [{**TOOL, "function": {"name": "f", "parameters": {"pattern": "(" * 3000}}}],
            "tool_choice": "required",
        },
        {"prompt_embeds": "gASV"},
        {"mm_processor_kwargs": {}, "prompt": "x"},
    ):
        add(CHAT, json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}))
    return found


async def status_of(live: Live, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    response = await live.http.post(path, content=body, headers={"content-type": "application/json"})
    return response.status_code, response.json()


def test_hostile_bodies_are_refused_soon_and_disturb_nobody() -> None:
    async def scenario() -> None:
        info = engine_info(max_context_tokens=1_000_000)
        async with live_server(Tokenizer(byte_level()), chat_template=HERMES, info=info, step_s=0.002) as live:
            await live.chat("warm", max_tokens=1)
            submitted = len(live.engine.submits)
            memory = psutil.Process().memory_info().rss
            slow: list[tuple[float, bytes]] = []
            async with undisturbed_stream(live):
                for path, body in bodies():
                    began = time.process_time()
                    status, answer = await status_of(live, path, body)
                    took = time.process_time() - began
                    slow += [(took, body[:80])] if took > 1 else []
                    assert 400 <= status < 500, (path, body[:200], answer)
                    assert set(answer["error"]) == {"message", "type", "param", "code"}
                    assert len(json.dumps(answer)) < 4000
            assert len(bodies()) >= 200
            assert not slow, slow
            assert len(live.engine.submits) == submitted + 1  # the stream that went on meanwhile
            assert psutil.Process().memory_info().rss - memory < 400 << 20

    run(scenario())


def test_a_hundred_megabytes_of_headers_are_not_read() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            written = 0
            async with sent(live, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n") as (_, writer):
                with contextlib.suppress(ConnectionError):
                    for _ in range(100):
                        writer.write(b"a: " + b"b" * (1 << 20) + b"\r\n")
                        await writer.drain()
                        written += 1
            assert written < 30
            assert (await live.http.get("/health")).status_code == 200

    run(scenario())
