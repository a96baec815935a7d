"""Tools as requests describe them, and the JSON schemas that make a model call one."""

import re
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from leanserve.contracts.errors import RequestError
from leanserve.server.protocol import JsonObject

__all__ = ["MAX_TOOLS", "Function", "Tool", "ToolChoice", "call_schema", "named_schema"]

MAX_TOOLS = 128

_NAME = r"^[A-Za-z0-9_.-]{1,64}$"


class Function(JsonObject):
    """A function the model may call."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; none: no parameters."""
    strict: bool | None = None


class Tool(JsonObject):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(JsonObject):
    name: str


class NamedTool(JsonObject):
    """The one function to call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def named_schema(tools: list[Tool], name: str) -> dict[str, Any]:
    """The schema of the arguments of one function.

    Raises:
        RequestError: no tool has that name.
    """
    for tool in tools:
        if tool.function.name == name:
            return _parameters(tool)
    raise RequestError(
        f"tool_choice names {name[:64]!r}; tools has {', '.join(tool.function.name for tool in tools)}",
        param="tool_choice",
        code="invalid_value",
    )


def call_schema(tools: list[Tool], *, parallel: bool) -> dict[str, Any]:
    """The schema of a list of one or more calls, each of any of the functions."""
    definitions: dict[str, Any] = {}
    calls = [_call(tool, definitions) for tool in tools]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema


def _call(tool: Tool, definitions: dict[str, Any]) -> dict[str, Any]:
    """One function's call. What its parameters define moves to the root, where references look for it."""
    name = tool.function.name
    parameters = dict(_parameters(tool))
    for keyword in ("$defs", "definitions"):
        for defined, schema in parameters.pop(keyword, {}).items():
            definitions[f"{name}.{defined}"] = _moved(schema, name)
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": _moved(parameters, name)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, name: str) -> Any:
    """A schema whose references to its own definitions follow them to the root."""
    if isinstance(schema, list):
        return [_moved(item, name) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in cast("dict[str, Any]", schema).items():
        if key == "$ref" and isinstance(value, str):
            moved[key] = re.sub(r"^#/(\$defs|definitions)/", f"#/$defs/{name}.", value)
        else:
            moved[key] = _moved(value, name)
    return moved


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
