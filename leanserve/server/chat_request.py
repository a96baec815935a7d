"""The body of POST /v1/chat/completions, and what all bodies with messages have in common."""

from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import Field

from leanserve.contracts.errors import RequestError
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from leanserve.server.generation_request import GenerationRequest
from leanserve.server.messages import Message
from leanserve.server.protocol import NOT_HONOURED, Body
from leanserve.server.tools import MAX_TOOLS, NamedTool, Tool, ToolChoice, call_schema, named_schema

__all__ = ["ChatRequest", "Conversation", "TokenizeRequest"]

_MAX_MESSAGES = 4096
_MAX_VARIABLE_CHARS = 256

_VARIABLES: dict[str, type] = {
    "enable_thinking": bool,
    "thinking": bool,
    "thinking_budget": int,
    "reasoning_effort": str,
    "date_string": str,
    "tools_in_user_message": bool,
}
"""Variables of published templates that a client may set: switches, and nothing that could be long."""

_HONOURED = ("messages", "tools", "tool_choice", "parallel_tool_calls")


Messages = Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)]


class Conversation(Body):
    """How the template puts messages."""

    expected: ClassVar[dict[str, str]] = {
        "messages": 'a list of objects such as {"role": "user", "content": "text"}; roles are system, developer, user, '
        "assistant and tool",
        "tools": 'a list of objects such as {"type": "function", "function": {"name": ..., "parameters": {...}}}',
        "tool_choice": 'none, auto, required or {"type": "function", "function": {"name": ...}}',
    }

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    """End with what begins the assistant's message; true if left out."""
    continue_final_message: bool | None = None
    """Go on in the middle of the last message instead."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template."""

    def check_conversation(self, messages: list[Message]) -> None:
        """Raises: RequestError where fields contradict each other, or a variable may not be set."""
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt are both true; give one of them",
                    param="continue_final_message",
                    code="invalid_value",
                )
            if messages[-1].content is None:
                raise RequestError(
                    "continue_final_message needs a last message with content", param="messages", code="invalid_value"
                )
        for name, value in (self.chat_template_kwargs or {}).items():
            kind = _VARIABLES.get(name)
            if kind is None or type(value) is not kind or (isinstance(value, str) and len(value) > _MAX_VARIABLE_CHARS):
                allowed = ", ".join(f"{name} ({kind.__name__})" for name, kind in _VARIABLES.items())
                raise RequestError(
                    f"chat_template_kwargs has {name[:50]!r} with a value of type {type(value).__name__}; "
                    f"allowed are {allowed}",
                    param="chat_template_kwargs",
                    code="invalid_value",
                )

    @property
    def prompts_for_more(self) -> bool:
        """Whether the assistant's next message is begun."""
        return self.add_generation_prompt is not False and not self.continue_final_message


class ChatRequest(Conversation, GenerationRequest):
    """POST /v1/chat/completions."""

    expected: ClassVar[dict[str, str]] = {**GenerationRequest.expected, **Conversation.expected}
    not_honoured: ClassVar[dict[str, tuple[object, ...]]] = {
        **{name: values for name, values in NOT_HONOURED.items() if name not in _HONOURED},
        "prompt": (),
        "echo": (False,),
        "best_of": (1,),
        "chat_template": (),
        "documents": (),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
    }

    messages: Messages
    logprobs: bool | None = None
    """Tell each token's log-probability."""
    top_logprobs: int | None = None
    """With logprobs: those of so many most likely ones too, 0 to 20."""
    tool_choice: ToolChoice | None = None
    """auto if there are tools, else none."""
    parallel_tool_calls: bool | None = None
    """False: one call at most."""
    reasoning_effort: Annotated[str | None, Field(max_length=_MAX_VARIABLE_CHARS)] = None
    """A variable of some templates."""

    def check(self) -> None:
        super().check()
        self.check_conversation(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs is given without logprobs: true", param="top_logprobs", code="invalid_value"
            )
        if self.tool_choice not in (None, "none") and not self.tools:
            raise RequestError("tool_choice is given without tools", param="tool_choice", code="invalid_value")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise RequestError("two tools have the same name", param="tools", code="invalid_value")

    @property
    def adds_special_tokens(self) -> bool:
        return self.add_special_tokens is True  # the template has written them

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def uses_tools(self) -> bool:
        """Whether the model is told of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def named_tool(self) -> str | None:
        """The one function that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    def sampling(self, *, default_max_tokens: int | None = None) -> SamplingParams:
        """As for every generation; a call that must be made is one more wish for the text's form."""
        sampling = super().sampling(default_max_tokens=default_max_tokens)
        schema = self._call_schema()
        if schema is None:
            return sampling
        if sampling.structured_outputs is not None:
            raise RequestError(
                "tool_choice makes the model write a call, and response_format or structured_outputs something else; "
                "give one of them",
                param="tool_choice",
                code="invalid_value",
            )
        return msgspec.structs.replace(sampling, structured_outputs=StructuredOutputsParams(json=schema))

    def _call_schema(self) -> dict[str, Any] | None:
        if not self.uses_tools or self.tools is None:
            return None
        if self.named_tool is not None:
            return named_schema(self.tools, self.named_tool)
        if self.tool_choice == "required":
            return call_schema(self.tools, parallel=self.parallel_tool_calls is not False)
        return None


class TokenizeRequest(Conversation):
    """POST /tokenize: a text, or messages."""

    not_honoured: ClassVar[dict[str, tuple[object, ...]]] = {
        name: values for name, values in NOT_HONOURED.items() if name not in _HONOURED
    }

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Put the tokenizer's own special tokens around; if left out, around a prompt, and not around messages."""

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError(
                "give prompt, a text, or messages, and not both",
                param="prompt",
                code="missing_field" if self.prompt is None else "invalid_value",
            )
        if self.messages is not None:
            self.check_conversation(self.messages)

    @property
    def adds_special_tokens(self) -> bool:
        return self.add_special_tokens if self.add_special_tokens is not None else self.prompt is not None
