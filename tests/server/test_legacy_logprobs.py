"""logprobs, echo and n on /v1/completions: OpenAI's legacy shape to the letter."""

from pathlib import Path
from typing import Any

import pytest

from leanserve.server.token_texts import TokenTexts
from leanserve.server.tokenizer import Tokenizer
from server.echo_engine import echo_logprobs
from server.front_end import live_server, run
from server.small_tokenizers import byte_fallback, byte_level, save

TOKENIZER = Tokenizer(byte_level())


def token_texts(token_ids: list[int]) -> list[str]:
    return [TokenTexts(TOKENIZER).text_of(token_id) for token_id in token_ids]


def expected_top(token_id: int, num_top: int) -> dict[str, float]:
    """What the echo engine's log-probabilities become."""
    [row] = echo_logprobs([token_id], num_top).rows()
    texts = TokenTexts(TOKENIZER)
    return {texts.text_of(top_id): logprob for top_id, logprob in reversed(row.top)} | {
        texts.text_of(token_id): row.logprob
    }


def test_logprobs_of_generated_tokens() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            ids = TOKENIZER.encode("The cat")
            for num_top in (0, 2):
                answer = (await live.complete(prompt="The cat", max_tokens=len(ids), logprobs=num_top)).json()
                assert answer["choices"][0]["logprobs"] == {
                    "tokens": token_texts(ids),
                    "token_logprobs": [-i / 8 for i in ids],
                    "top_logprobs": [expected_top(i, num_top) for i in ids],
                    "text_offset": [len(TOKENIZER.decode(ids[:i])) for i in range(len(ids))],
                }
            assert (await live.complete(prompt="The cat")).json()["choices"][0]["logprobs"] is None

    run(scenario())


@pytest.mark.parametrize("prompts", [[[5, 6, 11], [40], [40, 41, 42, 43]], [[5, 6]]], ids=["three", "one"])
@pytest.mark.parametrize("max_tokens", [1, 0])
def test_what_lm_eval_asks(prompts: list[list[int]], max_tokens: int) -> None:
    """`echo: true, logprobs: 1, max_tokens: 1`: prompt + 1 entries, the first null; it slices `[ctxlen:-1]`."""

    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            body = {"prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": True}
            answer = (await live.complete(**body, seed=1234)).json()
            for prompt, choice in zip(prompts, answer["choices"], strict=True):
                token_ids = prompt + prompt[:max_tokens]
                logprobs = choice["logprobs"]
                assert logprobs["tokens"] == token_texts(token_ids)
                assert logprobs["token_logprobs"] == [None, *(-i / 8 for i in token_ids[1:])]
                assert logprobs["top_logprobs"] == [None, *(expected_top(i, 1) for i in token_ids[1:])]
                assert choice["text"] == TOKENIZER.decode(token_ids)
                assert choice["finish_reason"] == "length"
                for token, logprob, top in list(zip(*list(logprobs.values())[:3], strict=True))[1:]:
                    assert top[token] == logprob
                for offset, count in zip(logprobs["text_offset"], range(len(token_ids)), strict=True):
                    assert offset == len(TOKENIZER.decode(token_ids[:count]))
            assert answer["usage"]["completion_tokens"] == max_tokens * len(prompts)
            assert [s.sampling.prompt_logprobs for s in live.engine.submits] == [1] * len(prompts)
            plain = (await live.complete(**body | {"logprobs": None})).json()
            assert [c["text"] for c in plain["choices"]] == [c["text"] for c in answer["choices"]]
            assert {c["logprobs"] for c in plain["choices"]} == {None}

    run(scenario())


def joined(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """One choice of a stream as the whole answer has it."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    whole = dict(choices[-1])
    whole["text"] = "".join(choice["text"] for choice in choices)
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    whole["logprobs"] = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
    return whole


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up_to_the_whole_answer(echo: bool) -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            body = {"prompt": ["The 你好 cat", "a"], "max_tokens": 9, "logprobs": 2, "echo": echo, "n": 2}
            whole = (await live.complete(**body)).json()
            chunks = await live.chunks(**body)
            assert [joined(chunks, i) for i in range(4)] == whole["choices"]
            first = [next(c for c in chunks if c["choices"][0]["index"] == i)["choices"][0] for i in range(4)]
            if echo:
                assert [c["text"] for c in first] == ["The 你好 cat"] * 2 + ["a"] * 2

    run(scenario())


def test_choices_are_numbered_by_prompt_then_sample_and_have_seeds_of_their_own() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            body = {"prompt": [[5, 6], [11, 12]], "n": 3, "best_of": 3, "seed": 40, "max_tokens": 2}
            answer = (await live.complete(**body, return_token_ids=True)).json()
            assert [choice["index"] for choice in answer["choices"]] == list(range(6))
            assert [choice["token_ids"] for choice in answer["choices"]] == [[5, 6]] * 3 + [[11, 12]] * 3
            assert [(s.sampling.seed, s.sampling.n) for s in live.engine.submits] == [(40 + i, 1) for i in range(3)] * 2
            assert answer["usage"]["prompt_tokens"] == 4, "samples of a prompt share it"
            assert answer["usage"]["completion_tokens"] == 12

    run(scenario())


def test_tokens_as_ids() -> None:
    async def scenario() -> None:
        for tokenizer in (TOKENIZER, None):
            async with live_server(tokenizer) as live:
                body = {"prompt": [5, 6], "max_tokens": 1, "logprobs": 1, "echo": True}
                answer = (await live.complete(**body, return_tokens_as_token_ids=True)).json()
                logprobs = answer["choices"][0]["logprobs"]
                assert logprobs["tokens"] == ["token_id:5", "token_id:6", "token_id:5"]
                assert logprobs["top_logprobs"] == [
                    None,
                    {"token_id:7": -0.125, "token_id:6": -0.75},
                    {"token_id:6": -0.125, "token_id:5": -0.625},
                ]

    run(scenario())


def test_characters_that_span_tokens_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(save(byte_fallback(), tmp_path, {}))
    assert tokenizer is not None

    async def scenario() -> None:
        async with live_server(tokenizer) as live:
            body = {"prompt": "The 京 cat", "max_tokens": 0, "logprobs": 0, "echo": True}
            [choice] = (await live.complete(**body)).json()["choices"]
            assert choice["text"] == "The 京 cat"
            logprobs = dict(zip(*[choice["logprobs"][k] for k in ("tokens", "text_offset")], strict=True))
            assert logprobs["<s>"] == 0
            assert logprobs["bytes:\\xe4"] == 4
            assert logprobs["bytes:\\xba"] == 4
            assert choice["logprobs"]["text_offset"][-1] <= len(choice["text"])
            ids = await live.complete(**body | {"prompt": tokenizer.encode("The cat")})
            assert ids.json()["choices"][0]["text"] == "The cat"
            assert ids.json()["choices"][0]["logprobs"]["text_offset"][:4] == [0, 0, 0, 1]

    run(scenario())


def test_prompts_are_cut_from_the_left() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            body = {"max_tokens": 1, "truncate_prompt_tokens": 2, "echo": True}
            ids = TOKENIZER.encode("The cat sat")
            answer = (await live.complete(prompt=["The cat sat", "a"], **body)).json()
            assert answer["choices"][0]["text"] == TOKENIZER.decode(ids[-2:]) + TOKENIZER.decode(ids[-2:-1])
            await live.complete(prompt=[5, 6, 11], **body)
            lengths = [len(submit.prompt_token_ids) // 4 for submit in live.engine.submits]
            assert lengths == [2, len(TOKENIZER.encode("a")), 2]

    run(scenario())
