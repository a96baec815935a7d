"""Real clients against a real server: `openai`, synchronous and asynchronous, and LangChain.

It has one rank: what clients see does not depend on ranks, as test_sampling_served and test_exactness show."""

import asyncio
import functools
import json
import operator
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

from leanserve.bundled import bundled_model_dir
from live_server import LiveServer, live_server

KEY = "sk-live-test-0001"
TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}\nAnswer:{% endif %}"
    "{# calls are written as <tool_call> #}"
)
FACT = "The brass key is in locker 4821. We sailed east under a bright sky.\nQuestion: Where is the brass key?"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "open_locker",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 9999}, "side": {"enum": ["a", "b"]}},
            "required": ["number", "side"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("served")
    model_dir = Path(shutil.copytree(bundled_model_dir(), directory / "model"))
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    (model_dir / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    (directory / "keys").write_text(KEY + "\n")
    (directory / "config.yaml").write_text("served-model-name: brass\nranks: 1\nkv_memory: 16MiB\n")
    arguments = ("--config", str(directory / "config.yaml"), "--api-key-file", str(directory / "keys"))
    with live_server(str(model_dir), *arguments, "--device", "cpu", log=directory / "log") as live:
        yield live


class Locker(BaseModel):
    """A locker to open."""

    number: Annotated[int, Field(ge=1, le=9999)]
    side: Literal["a", "b"]


def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def test_completions(server: LiveServer) -> None:
    with client(server) as ask:
        assert [model.id for model in ask.models.list()] == ["brass"]
        assert ask.models.retrieve("brass").id == "brass"
        whole = ask.completions.create(
            model="brass", prompt=FACT + "\nAnswer:", temperature=0, max_tokens=12, logprobs=2
        )
        assert "4821" in whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens)  # type: ignore[union-attr, arg-type]
        stream = ask.completions.create(
            model="brass",
            prompt=FACT + "\nAnswer:",
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None
        two = ask.completions.create(model="brass", prompt=[[300, 301], [302]], n=2, max_tokens=2, seed=7)
        assert [choice.index for choice in two.choices] == [0, 1, 2, 3]


def test_chat(server: LiveServer) -> None:
    with client(server) as ask:
        said: Any = [{"role": "user", "content": [{"type": "text", "text": FACT}]}]
        whole = ask.chat.completions.create(
            model="brass", messages=said, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=3
        )
        message = whole.choices[0].message
        assert message.role == "assistant"
        assert "4821" in (message.content or "")
        tokens = whole.choices[0].logprobs.content or []  # type: ignore[union-attr]
        assert len(tokens) == whole.usage.completion_tokens  # type: ignore[union-attr]
        assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob <= 0 for token in tokens)
        assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)  # greedy
        with ask.chat.completions.stream(
            model="brass", messages=said, temperature=0, max_completion_tokens=12
        ) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == message.content


def test_a_call_is_made_when_it_must_be(server: LiveServer) -> None:
    with client(server) as ask:
        named: Any = {"type": "function", "function": {"name": "open_locker"}}
        for choice in ("required", named):
            body: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "temperature": 0, "max_tokens": 200}
            said: Any = [{"role": "user", "content": FACT}]
            answer = ask.chat.completions.create(model="brass", messages=said, parallel_tool_calls=False, **body)
            [call] = answer.choices[0].message.tool_calls or []
            arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
            assert set(arguments) == {"number", "side"}
            assert 1 <= arguments["number"] <= 9999
            assert answer.choices[0].finish_reason == "tool_calls"
            with ask.chat.completions.stream(model="brass", messages=said, parallel_tool_calls=False, **body) as stream:
                final = stream.get_final_completion().choices[0].message.tool_calls or []
            assert [c.function.arguments for c in final] == [call.function.arguments]  # type: ignore[union-attr]


def test_langchain(server: LiveServer) -> None:
    def chat(max_tokens: int) -> ChatOpenAI:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "max_retries": 0, "stream_usage": True}
        return ChatOpenAI(model="brass", base_url=f"{server.url}/v1", api_key=SecretStr(KEY), **options)

    answer = chat(12).invoke(FACT)
    assert "4821" in answer.text
    assert answer.response_metadata["finish_reason"] == "stop"
    chunks = list(chat(12).stream(FACT))
    whole = functools.reduce(operator.add, chunks)
    assert isinstance(whole, AIMessageChunk)
    assert whole.text == answer.text
    assert len([chunk for chunk in chunks if chunk.text]) > 3
    assert (whole.usage_metadata or {})["total_tokens"] == (answer.usage_metadata or {})["total_tokens"]
    assert [message.text for message in chat(12).batch([FACT] * 3)] == [answer.text] * 3
    assert [message.text for message in asyncio.run(chat(12).abatch([FACT] * 2))] == [answer.text] * 2

    found = chat(400).with_structured_output(Locker, method="json_schema").invoke(FACT)
    assert isinstance(found, Locker)

    must_call = chat(200).bind_tools([TOOL], tool_choice="open_locker", parallel_tool_calls=False)
    [call] = must_call.invoke(FACT).tool_calls
    Locker.model_validate(call["args"])
    streamed = functools.reduce(operator.add, must_call.stream(FACT))
    assert [other["args"] for other in streamed.tool_calls] == [call["args"]]
    said = [HumanMessage(FACT), AIMessage("", tool_calls=[call]), ToolMessage("open", tool_call_id=call["id"])]
    assert chat(4).bind_tools([TOOL]).invoke(said).response_metadata["finish_reason"] in ("stop", "length")


def test_errors_are_the_clients_own(server: LiveServer) -> None:
    with client(server) as ask:
        with pytest.raises(openai.BadRequestError, match="temperature"):
            ask.completions.create(model="brass", prompt="x", temperature=9)
        with pytest.raises(openai.NotFoundError, match="not served here"):
            ask.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError) as too_long:
            ask.completions.create(model="brass", prompt=[1] * 70_000, max_tokens=1)
        assert too_long.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-not-the-key", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_many_at_once_and_one_that_leaves(server: LiveServer) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as ask:

            async def one(place: int) -> str:
                text = ""
                stream = await ask.chat.completions.create(
                    model="brass",
                    messages=[{"role": "user", "content": f"{FACT} {place}"}],
                    max_tokens=8,
                    temperature=0,
                    stream=True,
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            texts = await asyncio.gather(*(one(place) for place in range(16)))
            assert all(texts)
            stream = await ask.completions.create(model="brass", prompt="We sailed", max_tokens=2000, stream=True)
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(scenario())
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(50):
        metrics = httpx.get(f"{server.url}/metrics", headers=headers).text
        used = [line for line in metrics.splitlines() if line.startswith("leanserve:kv_cache_pages_used{")]
        if all(line.endswith(" 0.0") for line in used):
            break
    assert used
    assert all(line.endswith(" 0.0") for line in used), used
    assert 'leanserve:client_disconnects_total{engine="0",model_name="brass",phase="decode"} 1.0' in metrics
