"""Calls are found in what models write, however the text is cut into pieces."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanserve.contracts.errors import ConfigError, RequestError
from leanserve.server.chat_request import ChatRequest
from leanserve.server.tool_calls import ToolCallParser, find_tool_format, tool_format
from leanserve.server.tools import Tool, call_schema, named_schema
from server.chat_templates import CHATML, HERMES, LLAMA3, MISTRAL

ARGUMENTS: dict[str, Any] = {"city": 'Par"is}]</tool_call>\\', "days": [1, {"a": None}], "é": "😀"}
WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
NAMES = {"weather", "time"}

CASES: dict[str, tuple[dict[str, Any], str, str, list[tuple[str, Any]]]] = {
    "hermes": (
        {"style": "hermes"},
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": ' + WRITTEN + "}\n</tool_call>\n"
        '<tool_call>{"arguments": {}, "name": "time"}</tool_call>',
        "Let me see.\n",
        [("weather", ARGUMENTS), ("time", {})],
    ),
    "hermes, text after": (
        {"style": "hermes"},
        '<tool_call>{"name": "time"}</tool_call> Done. 1 < 2 <tool',
        "Done. 1 < 2 <tool",
        [("time", {})],
    ),
    "hermes, arguments as text": (
        {"style": "hermes"},
        '<tool_call>{"name": "time", "arguments": ' + json.dumps('{"zone": 1}') + "}</tool_call>",
        "",
        [("time", {"zone": 1})],
    ),
    "llama3": ({"style": "llama3"}, '{"name": "weather", "parameters": ' + WRITTEN + "}", "", [("weather", ARGUMENTS)]),
    "llama3, two": (
        {"style": "llama3"},
        '<|python_tag|>{"name": "time", "parameters": {}}; {"name": "weather", "parameters": {"a": 1}}',
        "",
        [("time", {}), ("weather", {"a": 1})],
    ),
    "llama3, other JSON": ({"style": "llama3"}, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    "llama3, text": ({"style": "llama3"}, 'It is {"a": 1}.', 'It is {"a": 1}.', []),
    "mistral": (
        {"style": "mistral"},
        '[TOOL_CALLS] [{"name": "weather", "arguments": ' + WRITTEN + '}, {"name": "time", "arguments": {}}]',
        "",
        [("weather", ARGUMENTS), ("time", {})],
    ),
    "mistral, newer": (
        {"style": "mistral"},
        "Hm.[TOOL_CALLS]weather[ARGS]" + WRITTEN + "[TOOL_CALLS]time[CALL_ID]abc[ARGS]{}",
        "Hm.",
        [("weather", ARGUMENTS), ("time", {})],
    ),
    "required": (
        {"style": None},
        '[{"name": "weather", "arguments": ' + WRITTEN + '}, {"name": "time", "arguments": {}}]',
        "",
        [("weather", ARGUMENTS), ("time", {})],
    ),
    "named": ({"style": None, "only": "weather"}, WRITTEN, "", [("weather", ARGUMENTS)]),
    "one at most": (
        {"style": None, "parallel": False},
        '[{"name": "weather", "arguments": {"a": 1}}, {"name": "time", "arguments": {}}]',
        "",
        [("weather", {"a": 1})],
    ),
    "one at most, the next cut off": (
        {"style": "hermes", "parallel": False},
        'Hm.<tool_call>{"name": "time"}</tool_call>\n<tool_call>{"name": "weather", "arguments": {"city": "Par',
        "Hm.",
        [("time", {})],
    ),
    "one at most, the next without a name yet": (
        {"style": None, "parallel": False},
        '[{"name": "weather", "arguments": {"a": 1}}, {"na',
        "",
        [("weather", {"a": 1})],
    ),
    "one at most, a name cut off": (
        {"style": "mistral", "parallel": False},
        "[TOOL_CALLS]time[ARGS]{}[TOOL_CALLS]weath",
        "",
        [("time", {})],
    ),
    "one at most, text after": (
        {"style": "llama3", "parallel": False},
        '{"name": "time", "parameters": {}} Done.',
        "Done.",
        [("time", {})],
    ),
    "a name cut off": (
        {"style": "mistral"},
        "[TOOL_CALLS]time[ARGS]{}[TOOL_CALLS]weath",
        "weath",
        [("time", {})],
    ),
    "no call": ({"style": "hermes"}, "Nothing to call, a < b.", "Nothing to call, a < b.", []),
    "cut off": ({"style": "hermes"}, '<tool_call>{"na', '{"na', []),
    "no JSON": ({"style": "hermes"}, "<tool_call>{look at this}</tool_call>", "{look at this}</tool_call>", []),
}


def parsed(options: dict[str, Any], pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(options.get("style"), NAMES, **{k: v for k, v in options.items() if k != "style"})
    content, calls, ids = "", {}, set()
    for deltas in [*map(parser.push, pieces), parser.finish()]:
        content += deltas.content
        for call in deltas.calls:
            function: Any = call["function"]
            if "id" in call:
                assert call["index"] == len(calls)
                ids.add(call["id"])
                calls[call["index"]] = [function["name"], ""]
            calls[call["index"]][1] += function["arguments"]
    assert len(ids) == len(calls) == parser.num_calls
    return content, [(name, arguments) for name, arguments in calls.values()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case)
@settings(max_examples=15)
@given(data=st.data())
def test_any_cut_of_the_text_gives_the_same_calls(case: str, data: st.DataObject) -> None:
    options, text, content, calls = CASES[case]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=30)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    seen_content, seen_calls = parsed(options, pieces)
    assert [(name, json.loads(arguments)) for name, arguments in seen_calls] == calls
    assert seen_content == content


def test_arguments_are_told_while_they_are_written() -> None:
    parser = ToolCallParser("hermes", NAMES)
    told = [parser.push(char).calls for char in '<tool_call>{"name": "time", "arguments": {"zone": "CET"}}']
    with_arguments = [calls for calls in told if calls]
    assert len(with_arguments) > 10
    assert with_arguments[0][0]["function"] == {"name": "time", "arguments": ""}


def test_the_format_is_read_off_the_template() -> None:
    assert [find_tool_format(t) for t in (CHATML, HERMES, LLAMA3, MISTRAL)] == [None, "hermes", "llama3", "mistral"]
    assert find_tool_format("<tool_call><function=name>") is None  # another format with the same mark
    assert tool_format("hermes") == "hermes"
    with pytest.raises(ConfigError, match="allowed are hermes, llama3, mistral and auto"):
        tool_format("xml")


POINT = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "integer"}}}


def test_schemas_of_calls_keep_references_alive() -> None:
    tools = [Tool.model_validate({"type": "function", "function": {"name": n, "parameters": POINT}}) for n in "ab"]
    tools.append(Tool.model_validate({"type": "function", "function": {"name": "c"}}))
    schema = call_schema(tools, parallel=False)
    assert schema["maxItems"] == 1
    assert set(schema["$defs"]) == {"a.P", "b.P"}
    assert schema["items"]["anyOf"][1]["properties"]["arguments"]["properties"]["p"] == {"$ref": "#/$defs/b.P"}
    assert "$defs" not in schema["items"]["anyOf"][0]["properties"]["arguments"]
    assert named_schema(tools, "a") == POINT
    with pytest.raises(RequestError, match="tools has a, b, c"):
        named_schema(tools, "d")


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.parse(json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode())


def test_a_call_that_must_be_made_is_a_schema() -> None:
    tools = [{"type": "function", "function": {"name": "a", "parameters": POINT}}]
    named = {"type": "function", "function": {"name": "a"}}
    for choice, expected in (("required", "array"), (named, "object")):
        wished = chat(tools=tools, tool_choice=choice).sampling().structured_outputs
        assert wished is not None
        assert json.loads(str(wished.json))["type"] == expected
    for choice in ("none", "auto", None):
        assert chat(tools=tools, tool_choice=choice).sampling().structured_outputs is None
    with pytest.raises(RequestError, match="give one of them"):
        chat(tools=tools, tool_choice="required", response_format={"type": "json_object"}).sampling()
