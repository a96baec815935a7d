"""POST /v1/completions: what goes in comes out, whole and streamed."""

import asyncio
from pathlib import Path

import msgspec
import openai
import pytest

from leanserve.contracts.messages import Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.tokenizer import Tokenizer
from server.echo_engine import engine_info
from server.front_end import live_server, run
from server.small_tokenizers import byte_fallback, byte_level, save

TOKENIZER = Tokenizer(byte_level())


def unseeded(submit: Submit) -> SamplingParams:
    """What was asked for, without the seed that the front end drew."""
    assert submit.sampling.seed is not None
    return msgspec.structs.replace(submit.sampling, seed=None)


def test_text_in_text_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        tokenizer = Tokenizer.from_dir(save(byte_fallback(), tmp_path, {}))
        assert tokenizer is not None
        async with live_server(tokenizer) as live:
            # The engine echoes the prompt with its BOS, which has no text.
            answer = (await live.complete(prompt="The cat sat", max_tokens=400)).json()
            assert answer["object"] == "text_completion"
            assert answer["model"] == "echo"
            ids = tokenizer.encode("The cat sat")
            expected = tokenizer.decode((ids * 400)[:400])
            [choice] = answer["choices"]
            assert choice["text"].strip() == expected.strip()
            assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
            assert "token_ids" not in choice
            assert answer["usage"] == {
                "prompt_tokens": len(ids),
                "completion_tokens": 400,
                "total_tokens": len(ids) + 400,
                "prompt_tokens_details": {"cached_tokens": len(ids) // 2},
            }
            submit = live.engine.submits[0]
            assert unseeded(submit) == SamplingParams(max_tokens=400)

    run(scenario())


def test_every_sampling_field_reaches_the_engine() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            fields = {
                "max_tokens": 3,
                "temperature": 0,
                "top_p": 0.5,
                "top_k": 7,
                "min_p": 0.1,
                "seed": -(2**63),
                "stop": ["a", "bc"],
                "stop_token_ids": [4, 5],
                "ignore_eos": True,
                "cache_salt": "tenant 7",
                "priority": -3,
                "min_tokens": 2,
                "presence_penalty": 0.5,
                "frequency_penalty": -0.5,
                "repetition_penalty": 1.1,
                "logit_bias": {"7": -100},
                "allowed_token_ids": [6, 8],
                "logprobs": 20,
                "structured_outputs": {"choice": ["a", "b"], "regex": None},
                "truncate_prompt_tokens": 4,
            }
            assert (await live.complete(prompt="x", **fields)).status_code == 200
            fields["stop"], fields["stop_token_ids"] = ("a", "bc"), (4, 5)
            fields["logit_bias"], fields["structured_outputs"] = {7: -100}, {"choice": ["a", "b"]}
            assert live.engine.submits[0].sampling == SamplingParams(**fields)
            assert (await live.complete(prompt="x", stop="\n", max_completion_tokens=2)).status_code == 200
            assert unseeded(live.engine.submits[1]) == SamplingParams(max_tokens=2, stop=("\n",))
            assert (await live.complete(prompt="x", **dict.fromkeys(fields), user="me", n=1)).status_code == 200
            assert unseeded(live.engine.submits[2]) == SamplingParams()

    run(scenario())


def test_a_stream_has_one_chunk_a_token_and_ends_properly() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            chunks = await live.chunks(prompt="The 你好 cat", max_tokens=30, return_token_ids=True)
            assert len(chunks) == 30
            assert len({chunk["id"] for chunk in chunks}) == 1
            choices = [chunk["choices"][0] for chunk in chunks]
            ids = TOKENIZER.encode("The 你好 cat")
            assert [choice["token_ids"] for choice in choices] == [[i] for i in (ids * 30)[:30]]
            assert [choice["finish_reason"] for choice in choices] == [None] * 29 + ["length"]
            text = "".join(choice["text"] for choice in choices)
            assert text == TOKENIZER.decode((ids * 30)[:30])
            assert all("usage" not in chunk for chunk in chunks)
            whole = (await live.complete(prompt="The 你好 cat", max_tokens=30)).json()
            assert whole["choices"][0]["text"] == text

    run(scenario())


def test_several_tokens_in_one_output_are_several_chunks() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER, tokens_per_output=4) as live:
            chunks = await live.chunks(prompt="The cat", max_tokens=10)
            assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 9 + ["length"]

    run(scenario())


def test_who_holds_a_prompt_is_told_once_and_only_when_asked() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            lengths = (40, 7)
            asked = {"prompt": [[5] * n for n in lengths], "max_tokens": 3, "return_page_owners": True}
            expected = {i: {"page_tokens": 16, "ranks": live.engine.page_owners(n)} for i, n in enumerate(lengths)}
            assert expected[0]["ranks"] == [2, 0, 1]
            whole = (await live.complete(**asked)).json()
            assert {choice["index"]: choice["page_owners"] for choice in whole["choices"]} == expected
            choices = [chunk["choices"][0] for chunk in await live.chunks(**asked)]
            told = [(choice["index"], choice["page_owners"]) for choice in choices if "page_owners" in choice]
            assert len(choices) == 6
            assert len(told) == 2
            assert dict(told) == expected
            unasked = (await live.complete(prompt=[5] * 40)).json()
            assert "page_owners" not in unasked["choices"][0]

    run(scenario())


def test_usage_in_streams() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            body = {"prompt": [5, 6, 11], "max_tokens": 4}
            chunks = await live.chunks(**body, stream_options={"include_usage": True})
            assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"] == {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 1},
            }
            chunks = await live.chunks(**body, stream_options={"include_usage": True, "continuous_usage_stats": True})
            assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]
            chunks = await live.chunks(**body, stream_options={"include_usage": False})
            assert len(chunks) == 4

    run(scenario())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("tokens_per_output", [1, 5])
def test_a_stop_string_over_token_borders_ends_text_and_work(streamed: bool, tokens_per_output: int) -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER, tokens_per_output=tokens_per_output, step_s=0.002) as live:
            body = {"prompt": "ab cd ST OP ef", "max_tokens": 3000, "stop": ["T O", "never"], "return_token_ids": True}
            if streamed:
                chunks = await live.chunks(**body, stream_options={"include_usage": True})
                choices = [chunk["choices"][0] for chunk in chunks[:-1]]
                usage = chunks[-1]["usage"]
                assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
            else:
                answer = (await live.complete(**body)).json()
                choices, usage = answer["choices"], answer["usage"]
            assert "".join(choice["text"] for choice in choices) == "ab cd S"
            assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "T O")
            token_ids = [token_id for choice in choices for token_id in choice["token_ids"]]
            assert usage["completion_tokens"] == len(token_ids) < 14
            assert "T O" in TOKENIZER.decode(token_ids)
            await live.quiet()
            assert list(live.engine.aborts.values()) == [1]

    run(scenario())


@pytest.mark.parametrize("stop", ["zz", "z!"])
def test_text_held_back_comes_with_the_last_token(stop: str) -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            for text, max_tokens in (("abz", 3), ("a😀", len(TOKENIZER.encode("a😀")) - 1)):
                body = {"prompt": text, "max_tokens": max_tokens, "stop": stop}
                expected = TOKENIZER.decode(TOKENIZER.encode(text)[:max_tokens])
                assert (await live.complete(**body)).json()["choices"][0]["text"] == expected
                choices = [chunk["choices"][0] for chunk in await live.chunks(**body)]
                assert "".join(choice["text"] for choice in choices) == expected
                assert (choices[-1]["text"][-1], choices[-1]["finish_reason"]) == (expected[-1], "length")

    run(scenario())


def test_the_stop_string_may_stay() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            answer = (await live.complete(prompt="abcdef", stop="cd", include_stop_str_in_output=True)).json()
            assert answer["choices"][0]["text"] == "abcd"

    run(scenario())


def test_stop_tokens_and_end_tokens() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            answer = (await live.complete(prompt=[5, 6, 11, 12], stop_token_ids=[11], return_token_ids=True)).json()
            [choice] = answer["choices"]
            assert (choice["finish_reason"], choice["stop_reason"], choice["token_ids"]) == ("stop", 11, [5, 6, 11])
            answer = (await live.complete(prompt=[5, 2, 11], return_token_ids=True)).json()
            [choice] = answer["choices"]
            assert (choice["finish_reason"], choice["stop_reason"], choice["token_ids"]) == ("stop", None, [5, 2])
            assert choice["text"] == TOKENIZER.decode([5])
            answer = (await live.complete(prompt=[5, 2, 11], ignore_eos=True, max_tokens=6)).json()
            assert answer["choices"][0]["finish_reason"] == "length"
            shown = (await live.complete(prompt=[5, 2, 11], skip_special_tokens=False)).json()
            assert shown["choices"][0]["text"].endswith("</s>")
            assert live.engine.aborts == {}

    run(scenario())


@pytest.mark.parametrize("prompts", [["The cat", "a", "你好"], [[5], [6, 11], [12, 13, 14]]], ids=["texts", "ids"])
def test_many_prompts_are_many_choices(prompts: list[str] | list[list[int]]) -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            ids = [TOKENIZER.encode(p) if isinstance(p, str) else p for p in prompts]
            expected = [(one * 9)[:9] for one in ids]
            answer = (await live.complete(prompt=prompts, max_tokens=9, return_token_ids=True)).json()
            assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
            assert [choice["token_ids"] for choice in answer["choices"]] == expected
            total = sum(len(one) for one in ids)
            assert answer["usage"] == {
                "prompt_tokens": total,
                "completion_tokens": 27,
                "total_tokens": total + 27,
                "prompt_tokens_details": {"cached_tokens": sum(len(one) // 2 for one in ids)},
            }
            streamed: list[list[int]] = [[], [], []]
            ends: list[int] = []
            for chunk in await live.chunks(prompt=prompts, max_tokens=9, return_token_ids=True):
                [choice] = chunk["choices"]
                streamed[choice["index"]] += choice["token_ids"]
                if choice["finish_reason"]:
                    ends.append(choice["index"])
            assert streamed == expected
            assert sorted(ends) == [0, 1, 2]

    run(scenario())


def test_special_tokens_around_text_can_be_left_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        tokenizer = Tokenizer.from_dir(save(byte_fallback(), tmp_path, {}))
        async with live_server(tokenizer) as live:
            for add in (None, True, False):
                await live.complete(prompt="The", add_special_tokens=add)
            lengths = [len(submit.prompt_token_ids) // 4 for submit in live.engine.submits]
            assert lengths[0] == lengths[1] == lengths[2] + 1

    run(scenario())


def test_tokenize_and_detokenize(tmp_path: Path) -> None:
    async def scenario() -> None:
        tokenizer = Tokenizer.from_dir(save(byte_fallback(), tmp_path, {}))
        assert tokenizer is not None
        async with live_server(tokenizer) as live:
            ids = tokenizer.encode("The cat sat")
            answer = await live.http.post("/tokenize", json={"prompt": "The cat sat", "model": "echo"})
            assert answer.json() == {"count": len(ids), "max_model_len": 4096, "tokens": ids}
            answer = await live.http.post("/tokenize", json={"prompt": "The cat sat", "add_special_tokens": False})
            assert answer.json()["tokens"] == ids[1:]
            answer = await live.http.post("/detokenize", json={"tokens": ids})
            assert answer.json() == {"prompt": "<s> The cat sat"}
            for path, body in (
                ("/tokenize", {"prompt": ["a"]}),
                ("/tokenize", {"messages": []}),
                ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
                ("/detokenize", {"tokens": [10**6]}),
                ("/detokenize", {"tokens": [10**30]}),
                ("/detokenize", {"tokens": [-1]}),
                ("/detokenize", {"tokens": [True]}),
                ("/detokenize", {"tokens": "a"}),
            ):
                refused = await live.http.post(path, json=body)
                assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error"), body
        async with live_server(None) as live:
            assert (await live.http.post("/tokenize", json={"prompt": "a"})).status_code == 400
            assert (await live.http.post("/detokenize", json={"tokens": [5]})).status_code == 400

    run(scenario())


def test_token_ids_without_a_tokenizer() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            answer = (await live.complete(prompt=[5, 6], max_tokens=3, return_token_ids=True)).json()
            assert (answer["choices"][0]["token_ids"], answer["choices"][0]["text"]) == ([5, 6, 5], "")
            chunks = await live.chunks(prompt=[5, 6], max_tokens=3, return_token_ids=True)
            assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[5], [6], [5]]
            refused = await live.complete(prompt="text")
            assert refused.status_code == 400
            assert "no tokenizer" in refused.json()["error"]["message"]
            refused = await live.complete(prompt=[5], stop="x")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop")

    run(scenario())


def test_limits_are_exact_and_say_numbers() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER, info=engine_info(max_context_tokens=20)) as live:
            assert (await live.complete(prompt=[5] * 15, max_tokens=5)).status_code == 200
            for prompt, max_tokens in (([5] * 16, 5), ([5] * 16, None), ([5], 20), ([5], 10**30)):
                refused = await live.complete(prompt=prompt, max_tokens=max_tokens)
                error = refused.json()["error"]
                assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
                for number in (len(prompt), max_tokens or 16, 20):
                    assert str(number) in error["message"]
            refused = await live.complete(prompt="The cat " * 2000, max_tokens=1)
            assert "16000 characters" in refused.json()["error"]["message"]
            refused = await live.complete(prompt=[5] * 20, max_tokens=0, echo=True)
            assert "max_tokens is 0, for which 1 is computed and not answered: 21" in refused.json()["error"]["message"]
            assert len(live.engine.submits) == 1

    run(scenario())


def test_a_long_prompt_of_ids_arrives_whole() -> None:
    async def scenario() -> None:
        count = 200_000
        async with live_server(None, info=engine_info(vocab_size=50_000, max_context_tokens=count + 1)) as live:
            ids = [i % 50_000 for i in range(count)]
            answer = await live.complete(prompt=ids, max_tokens=1, return_token_ids=True)
            assert answer.json()["usage"]["prompt_tokens"] == count
            assert memoryview(live.engine.submits[0].prompt_token_ids).cast("i").tolist() == ids
            ids[150_000] = 50_000
            assert "50000" in (await live.complete(prompt=ids, max_tokens=1)).json()["error"]["message"]

    run(scenario())


def test_unknown_fields_are_counted_and_null_ones_are_nothing() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:
            harmless = {"suffix": None, "prompt_logprobs": None, "length_penalty": 1.0, "tools": []}
            answer = await live.complete(prompt="x", frobnicate={"a": [1]}, metadata=None, **harmless)
            assert answer.status_code == 200
            assert live.serving.counts.unknown_fields == 2

    run(scenario())


def test_sixty_four_streams_of_mixed_lengths() -> None:
    async def scenario() -> None:
        async with live_server(TOKENIZER) as live:

            async def one(i: int) -> None:
                prompt = [5 + (i + j) % 300 + (j == 0) * 10 for j in range(1 + i * 7 % 50)]
                chunks = await live.chunks(prompt=prompt, max_tokens=1 + i * 13 % 97, return_token_ids=True)
                ids = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
                assert ids == (prompt * 97)[: 1 + i * 13 % 97]
                assert chunks[-1]["choices"][0]["finish_reason"] == "length"

            await asyncio.gather(*(one(i) for i in range(64)))
            await live.quiet()
            assert live.client.engine.load.pages_used_per_rank == (0,)
            assert live.engine.aborts == {}
            assert all(isinstance(submit, Submit) for submit in live.engine.submits)
            assert len({submit.request_id for submit in live.engine.submits}) == 64

    run(scenario())


def test_the_openai_client() -> None:
    async def scenario() -> None:
        async with (
            live_server(TOKENIZER) as live,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{live.port}/v1", api_key="none") as client,
        ):
            answer = await client.completions.create(model="echo", prompt="The cat", max_tokens=8)
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 8
            pieces: list[str] = []
            stream = await client.completions.create(
                model="org/echo",
                prompt="The cat",
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                pieces += [choice.text for choice in chunk.choices]
            assert "".join(pieces) == answer.choices[0].text
            assert [model.id async for model in client.models.list()] == ["echo", "org/echo"]
            assert (await client.models.retrieve("org/echo")).id == "org/echo"
            with pytest.raises(openai.NotFoundError, match="other"):
                await client.completions.create(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError, match="temperature"):
                await client.completions.create(model="echo", prompt="x", temperature=3)
            failing = await client.completions.create(
                model="echo", prompt=[live.engine.error_token, 5, 6], max_tokens=9, stream=True
            )
            with pytest.raises(openai.APIError, match="odd case"):
                async for _ in failing:
                    pass

    run(scenario())
