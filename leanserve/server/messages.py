"""The messages of a conversation, as clients send them and as chat templates take them."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from leanserve.contracts.errors import RequestError
from leanserve.server.protocol import JsonObject

__all__ = ["Message", "template_messages"]


class ContentPart(JsonObject):
    """A part of a message; text is the only kind."""

    type: str
    text: str | None = None


class CalledFunction(JsonObject):
    name: str
    arguments: str
    """JSON."""


class ToolCall(JsonObject):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(JsonObject):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=4096, fail_fast=True)] | None = None
    """Text, or parts of it; null where there are tool_calls."""
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def text(self, place: int) -> str:
        """The text of all parts, a line each.

        Raises:
            RequestError: a part is no text.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise RequestError(
                    f"messages.{place} has a part of type {part.type[:50]!r}; this server takes text alone: "
                    '{"type": "text", "text": "..."}',
                    param="messages",
                    code="unsupported_content",
                )
        return "\n".join([part.text or "" for part in self.content])


def template_messages(messages: list[Message], *, knows_developers: bool) -> list[dict[str, Any]]:
    """Messages as templates take them: text for content, objects for the arguments of calls.

    Raises:
        RequestError: one has no content where it must have some.
    """
    taken: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise RequestError(
                f"messages.{place} has no content; only an assistant's message with tool_calls may have none",
                param="messages",
                code="invalid_value",
            )
        role = "system" if message.role == "developer" and not knows_developers else message.role
        entry: dict[str, Any] = {"role": role, "content": message.text(place)}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(message, name) is not None:
                entry[name] = getattr(message, name)
        if message.tool_calls:
            entry["tool_calls"] = [_call(call) for call in message.tool_calls]
        taken.append(entry)
    return taken


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments: Any = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
