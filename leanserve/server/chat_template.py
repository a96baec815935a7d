"""From messages to the one text that a model reads: the checkpoint's own template, run in a process of its own."""

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import orjson

from leanserve.contracts.errors import CheckpointError, RequestError
from leanserve.server.sidecar import Sidecar, SidecarEnded
from leanserve.server.tokenizer_files import read_tokenizer_file

__all__ = ["ChatTemplate"]

_WALL_S = 30.0
"""For one rendering, waiting for the processor included."""
_MEMORY_BYTES = 1 << 30
_MAX_CHARS = 32 << 20

_END_OF_TEXT = "\ue000continue here\ue000"
"""Marks where the last message ends when it is to be continued; private characters, cut off again."""


class ChatTemplate:
    """A checkpoint's chat templates. Rendering is asynchronous and takes turns.

    Args:
        templates: by name; `default`, and perhaps `tool_use`.
        special_tokens: what a template knows by names such as `bos_token`.
        cpu_s: for one rendering; ordinary templates take a millisecond.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], *, cpu_s: float = 2.0) -> None:
        self.templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._cpu_s = cpu_s
        limits = {"cpu_s": cpu_s, "memory_bytes": _MEMORY_BYTES, "max_chars": _MAX_CHARS}
        setup = orjson.dumps({"templates": self.templates, **limits})
        self._sidecar = Sidecar("leanserve.server.template_renderer", setup, _WALL_S)

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> "ChatTemplate | None":
        """Read chat_template.jinja, or what tokenizer_config.json holds; None where there is neither.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        directory = Path(model_dir)
        config = read_tokenizer_file(directory / "tokenizer_config.json")
        special = read_tokenizer_file(directory / "special_tokens_map.json") | config
        templates: dict[str, str] = {}
        given: Any = config.get("chat_template")
        if isinstance(given, str):
            templates["default"] = given
        for entry in cast("list[Any]", given) if isinstance(given, list) else ():
            named = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
            if isinstance(named.get("name"), str) and isinstance(named.get("template"), str):
                templates[named["name"]] = named["template"]
        path = directory / "chat_template.jinja"
        if path.is_file():
            try:
                templates["default"] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not templates:
            return None
        templates.setdefault("default", next(iter(templates.values())))
        tokens = {name: _token_text(value) for name, value in special.items() if name.endswith("_token")}
        return cls(templates, {name: text for name, text in tokens.items() if text is not None})

    @property
    def knows_tools(self) -> bool:
        """Whether a template says anything about tools."""
        return any("tools" in text for text in self.templates.values())

    @property
    def knows_developers(self) -> bool:
        """Whether the template has a place for messages of the role developer; others get them as system's."""
        return "developer" in self.templates["default"]

    async def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text for `messages`.

        Args:
            tools: in OpenAI's words; None where there are none.
            add_generation_prompt: end with what begins the assistant's message.
            continue_final_message: end in the middle of the last message instead, which must have text.
            variables: further ones, for the template alone.

        Raises:
            RequestError: the template refused the messages, or failed, or took too long.
            OverloadedError: many others wait for theirs.
        """
        if continue_final_message:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": f"{last['content']}{_END_OF_TEXT}"}]
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        order = {
            "template": name,
            "variables": {
                **self._special_tokens,
                **(variables or {}),
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            },
        }
        text = await self._ask(order)
        if not continue_final_message:
            return text
        begun, mark, _ = text.rpartition(_END_OF_TEXT)
        if not mark:
            raise RequestError(
                "this model's chat template does not show the last message, so it cannot be continued",
                param="continue_final_message",
                code="chat_template",
            )
        return begun

    async def start(self) -> None:
        """Start the process before the first request needs it. What is wrong with a template, requests will say."""
        with contextlib.suppress(SidecarEnded):
            await self._sidecar.start()

    async def close(self) -> None:
        """End the process."""
        await self._sidecar.close()

    async def _ask(self, order: dict[str, Any]) -> str:
        frame = await asyncio.to_thread(orjson.dumps, order)
        try:
            answer = await self._sidecar.ask(frame)
        except SidecarEnded as error:
            raise _template_error(f"it took longer than {self._cpu_s:g} s, or its process ended") from error
        text = answer[1:].decode()
        if answer[:1] != b"+":
            raise _template_error(text)
        return text


def _template_error(why: str) -> RequestError:
    return RequestError(
        f"this model's chat template cannot render the messages: {why}", param="messages", code="chat_template"
    )


def _token_text(value: object) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with its flags."""
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) else None
