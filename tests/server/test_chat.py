"""/v1/chat/completions over HTTP, before an engine that says the rendered conversation over and over."""

import json
from typing import Any

import pytest

from leanserve.server.tokenizer import Tokenizer
from server.front_end import Live, live_server, parse_events, run
from server.small_tokenizers import byte_fallback, byte_level
from server.test_http import is_error

BARE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""Says what was said, so the test chooses what the model writes."""
ROLES = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[next]{% endif %}"
)
CALLS = BARE + "{# tools are written as <tool_call> #}"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "look", "arguments": {"at": "the cat"}}</tool_call>'


def text_of(live: Live) -> str:
    """The newest prompt that the engine got."""
    from array import array

    tokenizer = live.serving.prompts.tokenizer
    assert tokenizer is not None
    return tokenizer.decode(array("i", live.engine.submits[-1].prompt_token_ids).tolist(), skip_special_tokens=False)


def streamed(response: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first choice's message put together as clients do it, and all chunks."""
    chunks = parse_events(response.text)
    message: dict[str, Any] = {"content": "", "tool_calls": {}}
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        for choice in chunk["choices"]:
            if choice["index"]:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message |= {"role": delta["role"]} if "role" in delta else {}
            for call in delta.get("tool_calls", ()):
                known = message["tool_calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                known["name"] += call["function"].get("name", "")
                known["arguments"] += call["function"]["arguments"]
    return message, chunks


def test_a_conversation_is_rendered_and_answered_whole_and_streamed() -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level()), chat_template=ROLES) as live:
            parts = {"role": "user", "content": [{"type": "text", "text": "The"}, {"type": "text", "text": "cat"}]}
            system = {"role": "developer", "content": "Sit."}
            answer = (await live.chat(system, parts, max_completion_tokens=6)).json()
            assert text_of(live) == "[system]Sit.[user]The\ncat[next]"
            assert answer["object"] == "chat.completion"
            assert answer["id"].startswith("chatcmpl-")
            [choice] = answer["choices"]
            assert choice["message"]["role"] == "assistant"
            assert (choice["finish_reason"], choice["index"]) == ("length", 0)
            assert "[system]Sit.".startswith(choice["message"]["content"])
            assert answer["usage"]["completion_tokens"] == 6
            body: dict[str, Any] = {"max_tokens": 6, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
            message, chunks = streamed(await live.chat(system, parts, **body))
            assert message["content"] == choice["message"]["content"]
            assert message["role"] == "assistant"
            assert len(chunks) == 2 * 6 + 1
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"]["completion_tokens"] == 12
            assert [c["choices"][0]["delta"].get("role") for c in chunks[:-1]].count("assistant") == 2

    run(scenario())


def test_what_is_left_of_the_context_is_the_default() -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level()), chat_template=ROLES) as live:
            await live.chat("The cat", stop="zzz")
            submit = live.engine.submits[-1]
            assert submit.sampling.max_tokens == 4096 - len(submit.prompt_token_ids) // 4
            refused = await live.chat("The cat " * 4000)
            assert is_error(refused, 400, "context_length_exceeded")
            assert "max_tokens is left out, so 1 must fit after it" in refused.json()["error"]["message"]

    run(scenario())


def test_a_message_is_continued_and_the_next_one_not_begun() -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level()), chat_template=ROLES) as live:
            begun = {"role": "assistant", "content": "The c"}
            await live.chat("Who?", begun, continue_final_message=True, max_tokens=1)
            assert text_of(live) == "[user]Who?[assistant]The c"
            await live.chat("Who?", add_generation_prompt=False, max_tokens=1)
            assert text_of(live) == "[user]Who?"
            counted = (
                await live.http.post("/tokenize", json={"messages": [{"role": "user", "content": "Who?"}]})
            ).json()
            assert counted["count"] == len(counted["tokens"]) > 0
            back = (await live.http.post("/detokenize", json={"tokens": counted["tokens"]})).json()
            assert back["prompt"] == "[user]Who?[next]"

    run(scenario())


def test_the_tokenizers_own_special_tokens_are_added_only_when_asked_for() -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_fallback()), chat_template=BARE) as live:
            for asked, count in ((None, 0), (False, 0), (True, 1)):
                await live.chat("cat", add_special_tokens=asked, max_tokens=1)
                assert text_of(live).count("<s>") == count

    run(scenario())


def test_calls_are_parsed_whole_and_streamed() -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level()), chat_template=CALLS, settings={"tool_format": None}) as live:
            spoken = f"Wait.{CALL}{CALL}</s>"
            answer = (await live.chat(spoken, tools=TOOLS)).json()["choices"][0]
            assert answer["finish_reason"] == "tool_calls"
            assert answer["message"]["content"] == "Wait."
            assert [call["function"] for call in answer["message"]["tool_calls"]] == [
                {"name": "look", "arguments": '{"at": "the cat"}'}
            ] * 2
            assert len({call["id"] for call in answer["message"]["tool_calls"]}) == 2
            message, chunks = streamed(await live.chat(spoken, tools=TOOLS, stream=True))
            assert message["content"] == "Wait."
            assert list(message["tool_calls"].values()) == [{"name": "look", "arguments": '{"at": "the cat"}'}] * 2
            assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
            one = (await live.chat(spoken, tools=TOOLS, parallel_tool_calls=False)).json()["choices"][0]
            assert len(one["message"]["tool_calls"]) == 1
            unused = (await live.chat(spoken, tools=TOOLS, tool_choice="none")).json()["choices"][0]
            assert unused["message"]["content"] == f"Wait.{CALL}{CALL}"
            assert unused["finish_reason"] == "stop"
            forced = await live.chat('[{"name": "look", "arguments": {}}]</s>', tools=TOOLS, tool_choice="required")
            assert forced.json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{}"
            assert live.engine.submits[-1].sampling.structured_outputs is not None
            choice = {"type": "function", "function": {"name": "look"}}
            named = (await live.chat('{"at": 1}</s>', tools=TOOLS, tool_choice=choice)).json()["choices"][0]
            assert named["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": 1}'}
            assert (named["message"]["content"], named["finish_reason"]) == (None, "tool_calls")
            for cut, stop in ((spoken, "cat"), ('{"at": "the cat"}</s>', "cat")):
                forced = choice if cut[0] == "{" else "auto"
                whole = (await live.chat(cut, tools=TOOLS, tool_choice=forced, stop=stop)).json()["choices"][0]
                assert whole["message"]["tool_calls"][0]["function"]["arguments"] == '{"at": "the '
                assert whole["finish_reason"] == "stop", "what calls it would find no JSON"

    run(scenario())


def test_earlier_calls_and_their_results_are_rendered() -> None:
    async def scenario() -> None:
        template = (
            "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.at }}{% endfor %}"
            "{{ m.content }}{{ m.tool_call_id }}{% endfor %}{# tools <tool_call> #}"
        )
        async with live_server(Tokenizer(byte_level()), chat_template=template) as live:
            call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "hat"}'}}
            called = {"role": "assistant", "content": None, "tool_calls": [call]}
            result = {"role": "tool", "tool_call_id": "c1", "content": "a cat"}
            await live.chat("Look.", called, result, tools=TOOLS, max_tokens=1)
            assert text_of(live) == "Look.hata catc1"

    run(scenario())


BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "no messages": ({"messages": []}, "messages"),
    "messages missing": ({"messages": None}, "messages"),
    "a role": ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "messages"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    "a prompt": ({"prompt": "x"}, "prompt"),
    "echo": ({"echo": True}, "echo"),
    "a template": ({"chat_template": "{{ 1 }}"}, "chat_template"),
    "a variable": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    "a variable's type": ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs"),
    "a long variable": ({"chat_template_kwargs": {"date_string": "x" * 300}}, "chat_template_kwargs"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "logprobs a number": ({"logprobs": 2}, "logprobs"),
    "tool_choice alone": ({"tool_choice": "required"}, "tool_choice"),
    "a tool_choice": ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
    "an unknown tool": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
    ),
    "two of a name": ({"tools": TOOLS * 2}, "tools"),
    "a tool's name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    "many tools": ({"tools": TOOLS * 129}, "tools"),
    "both ends": ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
}


def test_wrong_conversations_are_refused_in_our_words() -> None:
    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level()), chat_template=CALLS) as live:
            for name, (fields, param) in BAD.items():
                body = {"messages": [{"role": "user", "content": "x"}], **fields}
                response = await live.http.post("/v1/chat/completions", json=body)
                assert is_error(response, 400), name
                assert response.json()["error"]["param"] == param, (name, response.text)
            assert not live.engine.submits

    run(scenario())


@pytest.mark.parametrize(
    ("tokenizer", "template", "fields", "code", "said"),
    [
        (None, BARE, {}, "no_tokenizer", "token ids only"),
        (byte_level, None, {}, "no_chat_template", "/v1/completions"),
        (byte_level, None, {"tools": TOOLS}, "no_chat_template", "/v1/completions"),
        (byte_level, BARE, {"tools": TOOLS}, "unsupported", "says nothing of tools; leave them out"),
        (byte_level, BARE + "{# tools #}", {"tools": TOOLS}, "unsupported", "use tool_choice required"),
        (byte_level, "{{ raise_exception('only one message') }}", {}, "chat_template", "only one message"),
        (byte_level, "{{ nonsense", {}, "chat_template", "cannot render"),
    ],
    ids=["no tokenizer", "no template", "no template for tools", "no tools", "no format", "refused", "no jinja"],
)
def test_what_a_model_lacks_is_said_clearly(
    tokenizer: Any, template: str | None, fields: dict[str, Any], code: str, said: str
) -> None:
    async def scenario() -> None:
        own = None if tokenizer is None else Tokenizer(tokenizer())
        async with live_server(own, chat_template=template) as live:
            response = await live.chat("x", **fields)
            assert is_error(response, 400, code)
            assert said in response.json()["error"]["message"]
            assert (await live.complete(prompt=[5])).status_code == 200

    run(scenario())


def test_log_probabilities_have_chats_shape() -> None:
    from array import array

    from leanserve.contracts.logprobs import Logprobs
    from leanserve.server.chat import ChatCompletion
    from leanserve.server.chat_request import ChatRequest
    from leanserve.server.choices import Piece
    from leanserve.server.prompt_intake import Prompt

    tokenizer = Tokenizer(byte_level())
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    request = ChatRequest.parse(json.dumps(body).encode())
    sampling = request.sampling(default_max_tokens=4)
    assert sampling.logprobs == 2
    answer = ChatCompletion(request, Prompt(b"", 1, []), sampling, tokenizer, "m", None)
    ids = tokenizer.encode("é", add_special_tokens=False)
    values = array("f", [-0.5, float("-inf")]).tobytes()
    top = array("i", [ids[0], 300]).tobytes()
    logprobs = Logprobs(2, array("f", [-0.5]).tobytes(), array("i", [1]).tobytes(), top, values)
    [entry] = answer.choice_object(Piece(0, "", ids[:1], None, None, logprobs))["logprobs"]["content"]  # type: ignore[index]
    assert entry["logprob"] == -0.5
    assert bytes(entry["bytes"]) == tokenizer.token_bytes(ids[0])
    assert [t["logprob"] for t in entry["top_logprobs"]] == [-0.5, -9999.0]
    assert b"".join(tokenizer.token_bytes(t) for t in tokenizer.encode("naïve 😀")) == "naïve 😀".encode()
    fallback = Tokenizer(byte_fallback())
    said = b"".join(fallback.token_bytes(t) for t in fallback.encode("The é", add_special_tokens=False))
    assert said == " The é".encode()
