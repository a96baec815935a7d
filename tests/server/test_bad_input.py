"""Whatever is wrong with a request: a 4xx in OpenAI's words, at once, and nobody else notices."""

import asyncio
import contextlib
import json
import string
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leanserve.contracts.errors import RequestError
from leanserve.server.completion_request import CompletionRequest
from leanserve.server.tokenizer import Tokenizer
from server.echo_engine import engine_info
from server.front_end import PATIENCE_S, Live, live_server, run, until
from server.small_tokenizers import byte_level

TOKENIZER = Tokenizer(byte_level())
LONG = engine_info(max_context_tokens=1_000_000)
OK = b'"prompt": [5], "max_tokens": 1'

BAD_BODIES: dict[str, tuple[bytes, str | None]] = {
    # name: (body, the field that the error names)
    "nothing": (b"", None),
    "not JSON": (b"prompt=hello", None),
    "cut off": (b'{"prompt": "hel', None),
    "two documents": (b'{"prompt": "a"}{}', None),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', None),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), None),
    "a list": (b"[]", None),
    "null": (b"null", None),
    "a string": (b'"prompt"', None),
    "deep nesting": (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', None),
    "a lone surrogate in a name": (b'{"prompt": "a", "\\udfff": 1}', None),
    "a control character": (b'{"prompt": "a\x00"}', None),
    "no prompt": (b"{}", "prompt"),
    "prompt null": (b'{"prompt": null}', "prompt"),
    "prompt empty": (b'{"prompt": ""}', "prompt"),
    "prompt without ids": (b'{"prompt": []}', "prompt"),
    "prompt with an empty list": (b'{"prompt": [[5], []]}', "prompt"),
    "prompt with an empty string": (b'{"prompt": ["a", ""]}', "prompt"),
    "prompt a number": (b'{"prompt": 5}', "prompt"),
    "prompt an object": (b'{"prompt": {"text": "a"}}', "prompt"),
    "prompt of booleans": (b'{"prompt": [true, false]}', "prompt"),
    "prompt of floats": (b'{"prompt": [1.0, 2.5]}', "prompt"),
    "prompt of digits": (b'{"prompt": [5, "6"]}', "prompt"),
    "prompt of mixed lists": (b'{"prompt": [[5], "a"]}', "prompt"),
    "prompt three deep": (b'{"prompt": [[[5]]]}', "prompt"),
    "an id below 0": (b'{"prompt": [5, -1]}', "prompt"),
    "an id beyond the vocabulary": (b'{"prompt": [5, 512]}', "prompt"),
    "an id beyond 64 bits": (b'{"prompt": [99999999999999999999999]}', "prompt"),
    "a number of 5000 digits": (b'{"prompt": [' + b"9" * 5000 + b"]}", None),
    "too many prompts": (b'{"prompt": [' + b"[5]," * 128 + b"[5]]}", "prompt"),
    "400,000 wrong ids": (b'{"prompt": [5' + b',"x"' * 400_000 + b"]}", "prompt"),
    "too long": (b'{"prompt": [5], "max_tokens": 1000000}', "prompt"),
    "max_tokens 0": (b'{"prompt": [5], "max_tokens": 0}', "max_tokens"),
    "max_tokens 0 without echo": (b'{"prompt": [5], "max_tokens": 0, "logprobs": 1}', "max_tokens"),
    "max_tokens negative": (b'{"prompt": [5], "max_tokens": -1}', "max_tokens"),
    "max_tokens a string": (b'{"prompt": [5], "max_tokens": "3"}', "max_tokens"),
    "max_tokens true": (b'{"prompt": [5], "max_tokens": true}', "max_tokens"),
    "max_tokens a float": (b'{"prompt": [5], "max_tokens": 3.5}', "max_tokens"),
    "two max_tokens": (b"{" + OK + b', "max_completion_tokens": 2}', "max_completion_tokens"),
    "temperature NaN": (b"{" + OK + b', "temperature": NaN}', "temperature"),
    "temperature infinite": (b"{" + OK + b', "temperature": 1e999}', "temperature"),
    "temperature -Infinity": (b"{" + OK + b', "temperature": -Infinity}', "temperature"),
    "temperature 3": (b"{" + OK + b', "temperature": 3}', "temperature"),
    "temperature false": (b"{" + OK + b', "temperature": false}', "temperature"),
    "top_p 0": (b"{" + OK + b', "top_p": 0}', "top_p"),
    "top_p 1.1": (b"{" + OK + b', "top_p": 1.1}', "top_p"),
    "top_k -7": (b"{" + OK + b', "top_k": -7}', "top_k"),
    "top_k huge": (b"{" + OK + b', "top_k": 1' + b"0" * 300 + b"}", "top_k"),
    "min_p 2": (b"{" + OK + b', "min_p": 2}', "min_p"),
    "seed beyond 64 bits": (b"{" + OK + b', "seed": 9223372036854775808}', "seed"),
    "seed a float": (b"{" + OK + b', "seed": 1.5}', "seed"),
    "stop empty": (b"{" + OK + b', "stop": ""}', "stop"),
    "stop of numbers": (b"{" + OK + b', "stop": [1]}', "stop"),
    "stop too many": (b"{" + OK + b', "stop": ' + json.dumps(["x"] * 17).encode() + b"}", "stop"),
    "stop too long": (b"{" + OK + b', "stop": "' + b"x" * 257 + b'"}', "stop"),
    "stop_token_ids strange": (b"{" + OK + b', "stop_token_ids": [512]}', "stop_token_ids"),
    "stop_token_ids negative": (b"{" + OK + b', "stop_token_ids": [-1]}', "stop_token_ids"),
    "stop_token_ids huge": (b"{" + OK + b', "stop_token_ids": [99999999999999999999]}', "stop_token_ids"),
    "stop_token_ids too many": (
        b"{" + OK + b', "stop_token_ids": ' + json.dumps([5] * 1025).encode() + b"}",
        "stop_token_ids",
    ),
    "n 0": (b"{" + OK + b', "n": 0}', "n"),
    "n 129": (b"{" + OK + b', "n": 129}', "n"),
    "n a billion": (b"{" + OK + b', "n": 1000000000}', "n"),
    "n times prompts": (b'{"prompt": [[5], [6], [7]], "n": 50}', "n"),
    "best_of 2": (b"{" + OK + b', "best_of": 2}', "best_of"),
    "best_of other than n": (b"{" + OK + b', "n": 3, "best_of": 2}', "best_of"),
    "stream a string": (b"{" + OK + b', "stream": "true"}', "stream"),
    "stream_options without stream": (b"{" + OK + b', "stream_options": {}}', "stream_options"),
    "stream_options a list": (b"{" + OK + b', "stream": true, "stream_options": []}', "stream_options"),
    "include_usage a number": (
        b"{" + OK + b', "stream": true, "stream_options": {"include_usage": 1}}',
        "stream_options",
    ),
    "ignore_eos a number": (b"{" + OK + b', "ignore_eos": 1}', "ignore_eos"),
    "model a number": (b"{" + OK + b', "model": 3}', "model"),
    "user an object": (b"{" + OK + b', "user": {}}', "user"),
    "echo a number": (b"{" + OK + b', "echo": 1}', "echo"),
    "suffix": (b"{" + OK + b', "suffix": "end"}', "suffix"),
    "logprobs 21": (b"{" + OK + b', "logprobs": 21}', "logprobs"),
    "logprobs negative": (b"{" + OK + b', "logprobs": -1}', "logprobs"),
    "logprobs true": (b"{" + OK + b', "logprobs": true}', "logprobs"),
    "top_logprobs": (b"{" + OK + b', "top_logprobs": 3}', "top_logprobs"),
    "prompt_logprobs": (b"{" + OK + b', "prompt_logprobs": 3}', "prompt_logprobs"),
    "too many logprobs": (b'{"prompt": [' + b"5," * 200_000 + b'5], "echo": true, "logprobs": 20}', "logprobs"),
    "logit_bias a list": (b"{" + OK + b', "logit_bias": [5]}', "logit_bias"),
    "logit_bias by text": (b"{" + OK + b', "logit_bias": {"the": 1}}', "logit_bias"),
    "logit_bias too strong": (b"{" + OK + b', "logit_bias": {"5": 101}}', "logit_bias"),
    "logit_bias true": (b"{" + OK + b', "logit_bias": {"5": true}}', "logit_bias"),
    "logit_bias strange": (b"{" + OK + b', "logit_bias": {"512": 1}}', "logit_bias"),
    "logit_bias huge": (b"{" + OK + b', "logit_bias": {"9999999999999": 1}}', "logit_bias"),
    "logit_bias too many": (
        b"{" + OK + b', "logit_bias": ' + json.dumps(dict.fromkeys(range(400_000), "x")).encode() + b"}",
        "logit_bias",
    ),
    "allowed_token_ids none": (b"{" + OK + b', "allowed_token_ids": []}', "allowed_token_ids"),
    "allowed_token_ids strange": (b"{" + OK + b', "allowed_token_ids": [512]}', "allowed_token_ids"),
    "presence_penalty 3": (b"{" + OK + b', "presence_penalty": 3}', "presence_penalty"),
    "presence_penalty false": (b"{" + OK + b', "presence_penalty": false}', "presence_penalty"),
    "frequency_penalty -3": (b"{" + OK + b', "frequency_penalty": -3}', "frequency_penalty"),
    "repetition_penalty 0": (b"{" + OK + b', "repetition_penalty": 0}', "repetition_penalty"),
    "min_tokens beyond max_tokens": (b"{" + OK + b', "min_tokens": 4}', "min_tokens"),
    "min_tokens negative": (b"{" + OK + b', "min_tokens": -1}', "min_tokens"),
    "truncate_prompt_tokens 0": (b"{" + OK + b', "truncate_prompt_tokens": 0}', "truncate_prompt_tokens"),
    "truncate_prompt_tokens -1": (b"{" + OK + b', "truncate_prompt_tokens": -1}', "truncate_prompt_tokens"),
    "truncate_prompt_tokens huge": (
        b"{" + OK + b', "truncate_prompt_tokens": 9' + b"0" * 20 + b"}",
        "truncate_prompt_tokens",
    ),
    "response_format a text": (b"{" + OK + b', "response_format": "json_object"}', "response_format"),
    "response_format unheard of": (b"{" + OK + b', "response_format": {"type": "xml"}}', "response_format"),
    "response_format without a schema": (
        b"{" + OK + b', "response_format": {"type": "json_schema"}}',
        "response_format",
    ),
    "structured_outputs of nothing": (b"{" + OK + b', "structured_outputs": {}}', "structured_outputs"),
    "structured_outputs twice": (
        b"{" + OK + b', "structured_outputs": {"regex": "a", "json_object": true}}',
        "structured_outputs",
    ),
    "structured_outputs beside a format": (
        b"{" + OK + b', "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}',
        "structured_outputs",
    ),
    "a schema that is none": (
        b"{" + OK + b', "structured_outputs": {"json": {"type": "strange"}}}',
        "structured_outputs",
    ),
    "a regex that is none": (b"{" + OK + b', "structured_outputs": {"regex": "("}}', "structured_outputs"),
    "a grammar that is none": (b"{" + OK + b', "structured_outputs": {"grammar": "start: x"}}', "structured_outputs"),
    "a schema too long": (
        b"{" + OK + b', "structured_outputs": {"choice": ["' + b"x" * 200_000 + b'"]}}',
        "structured_outputs",
    ),
    "guided_json": (b"{" + OK + b', "guided_json": {}}', "guided_json"),
    "tools": (b"{" + OK + b', "tools": [{}]}', "tools"),
}


async def post(live: Live, body: bytes, content_type: str | None = "application/json") -> httpx.Response:
    headers = {} if content_type is None else {"content-type": content_type}
    return await live.http.post("/v1/completions", content=body, headers=headers)


@contextlib.asynccontextmanager
async def undisturbed_stream(live: Live) -> AsyncIterator[None]:
    """A stream runs meanwhile, and goes on after: each of its tokens is the right one."""
    token_ids: list[int] = []

    async def read() -> None:
        body = {"prompt": [5, 6, 11], "max_tokens": 900_000, "stream": True, "return_token_ids": True}
        async with live.http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line:
                    token_ids.extend(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])

    async def more_tokens() -> None:
        seen = len(token_ids)
        await until(lambda: reading.done() or len(token_ids) >= seen + 10)
        assert not reading.done(), reading

    reading = asyncio.create_task(read())
    await more_tokens()
    yield
    await more_tokens()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert token_ids == ([5, 6, 11] * len(token_ids))[: len(token_ids)]


def checked_error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) <= 1003
    return error


def test_every_kind_of_bad_body_while_a_stream_runs() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER, step_s=0.001, info=LONG) as live:
            async with undisturbed_stream(live):
                for name, (body, param) in BAD_BODIES.items():
                    began = time.process_time()
                    error = checked_error(await post(live, body))
                    assert error["param"] == param, (name, error)
                    assert error["code"], name
                    assert time.process_time() - began < 1, name
                for wrong in (None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"):
                    error = checked_error(await post(live, b"{" + OK + b"}", wrong))
                    assert error["code"] == "invalid_content_type"
                packed = {"content-type": "application/json", "content-encoding": "gzip"}
                error = checked_error(await live.http.post("/v1/completions", content=b"\x1f\x8b", headers=packed))
                assert "uncompressed" in error["message"]
                for model in (b"gpt-4", b"../../echo"):
                    error = checked_error(await post(live, b"{" + OK + b', "model": "' + model + b'"}'), 404)
                    assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert len(live.engine.submits) == 1
            assert (await post(live, b"{" + OK + b"}", "application/json; charset=utf-8")).status_code == 200

    run(scenario())


def test_errors_do_not_repeat_the_input() -> None:
    for body in (
        b'{"prompt": {"deep": "secret"}}',
        b'{"prompt": ["secret", 3]}',
        b'{"prompt": "secret", "max_tokens": "secret"}',
        b'{"prompt": "secret", "suffix": "secret"}',
        b'{"prompt": "secret" "secret"}',
    ):
        with pytest.raises(RequestError) as caught:
            CompletionRequest.parse(body)
        assert "secret" not in str(caught.value)


def test_many_errors_are_few_words() -> None:
    fields = [name for name in CompletionRequest.model_fields if name != "prompt"]
    body = {"prompt": "a", **{name: {"wrong": 1} for name in fields}}
    with pytest.raises(RequestError) as caught:
        CompletionRequest.parse(json.dumps(body).encode())
    assert str(caught.value).count(";") == 10
    assert " more" in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_letters, max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
KNOWN = [*CompletionRequest.model_fields, "suffix", "tools", "prompt_logprobs"]


def test_fuzzed_types_never_break_the_server() -> None:
    """Any JSON in any field: an answer or a 400, and a stream beside it that does not notice."""

    async def scenario() -> None:
        async with live_server(TOKENIZER, step_s=0.001, info=LONG) as live:
            live.engine.disarm()
            loop = asyncio.get_running_loop()

            @settings(max_examples=150, suppress_health_check=list(HealthCheck))
            @given(
                fields=st.dictionaries(st.sampled_from(KNOWN), JSON, max_size=4),
                prompt=st.sampled_from(["a", [5, 6], ["a", "b"], [[5], [6]]]) | JSON,
            )
            def fuzz(fields: dict[str, Any], prompt: Any) -> None:
                body = json.dumps({"max_tokens": 2, "prompt": prompt, **fields}).encode()
                response = asyncio.run_coroutine_threadsafe(post(live, body), loop).result(PATIENCE_S)
                assert response.status_code in (200, 400, 404), (response.status_code, body)
                if response.status_code != 200:
                    assert response.json()["error"]["message"]

            async with undisturbed_stream(live):
                await asyncio.to_thread(fuzz)
            await live.quiet()

    run(scenario())
