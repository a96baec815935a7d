"""Function calls out of what a model writes, while it writes: the formats that open models were trained on."""

import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

from leanserve.contracts.errors import ConfigError
from leanserve.server.call_scanner import CallScanner

__all__ = ["ToolCallParser", "ToolDeltas", "ToolFormat", "find_tool_format", "tool_format"]

ToolFormat = Literal["hermes", "llama3", "mistral"]

_MARKS: dict[ToolFormat, tuple[str, str]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>", ""),
    "mistral": ("[TOOL_CALLS]", ""),
}
"""What comes before a call, and after it."""

_BETWEEN_CALLS = " \t\r\n,;[]"
_NAMED_BEFORE = re.compile(r"([\w.-]+)(?:\[CALL_ID\][\w-]+)?\[ARGS\]\s*$")
"""Newer Mistral models write `name[ARGS]{...}`."""


def tool_format(name: str) -> ToolFormat:
    """Raises: ConfigError for a name that is none."""
    for known in get_args(ToolFormat):
        if name == known:
            return known
    raise ConfigError(f"tool format is {name!r}; allowed are {', '.join(get_args(ToolFormat))} and auto")


def find_tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, by what it says itself; None where it says nothing known."""
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or ('"parameters"' in template and "ipython" in template):
        return "llama3"
    return None


@dataclass
class ToolDeltas:
    """What a piece of text adds to a message, in OpenAI's shape."""

    content: str = ""
    calls: list[dict[str, object]] = field(default_factory=list[dict[str, object]])


class ToolCallParser:
    """Takes a choice's text apart: what is said, and what is called. Text that turns out to be no call is said.

    Args:
        style: the format; None: a JSON list of calls and nothing else, as `call_schema` enforces it.
        names: of the functions there are.
        only: the text is the arguments of this function and nothing else, as `named_schema` enforces it.
        parallel: False: only the first call counts.
    """

    def __init__(
        self,
        style: ToolFormat | None,
        names: Collection[str],
        *,
        only: str | None = None,
        parallel: bool = True,
    ) -> None:
        self.num_calls = 0
        self.was_cut = False
        """The text ended within a call, whose arguments are no JSON therefore."""
        self._style = style
        self._names = names
        self._parallel = parallel
        self._begin, self._end = _MARKS[style] if style is not None else ("", "")
        self._held = ""
        self._in_calls = style is None
        self._may_be_bare = style == "llama3"
        self._is_after_call = False
        self._scanner: CallScanner | None = None if only is None else CallScanner(only)
        self._call_index = -1
        self._deltas = ToolDeltas()

    def push(self, text: str) -> ToolDeltas:
        """More text; returns what it adds, as far as it can be told apart."""
        self._held += text
        self._deltas = ToolDeltas()
        while self._step():
            pass
        return self._deltas

    def finish(self) -> ToolDeltas:
        """No more text comes; returns what was held back."""
        self._deltas = ToolDeltas()
        self.was_cut = self._scanner is not None and self._call_index >= 0
        counts = self._parallel or self.num_calls == 0  # or else the call that was begun is dropped as a whole one is
        if self._scanner is not None and not self.was_cut and counts:  # it never became a call
            self._say(self._scanner.text)
        rest = self._held
        if self._in_calls:
            said, _, begun = rest.partition(self._begin) if self._begin else (rest, "", "")
            rest = (said + begun if counts else said).strip(_BETWEEN_CALLS)
        self._scanner, self._held = None, ""
        self._say(rest)
        return self._deltas

    def _step(self) -> bool:
        """One move in the text held; False when more of it is needed."""
        if not self._held:
            return False
        if self._scanner is not None:
            return self._scan(self._scanner)
        return self._between_calls() if self._in_calls else self._in_content()

    def _in_content(self) -> bool:
        if self._is_after_call:
            self._held = self._held.lstrip()
            self._is_after_call = not self._held
        if self._may_be_bare and (begun := self._held.lstrip()):
            self._may_be_bare = False
            if begun.startswith("{"):
                self._held = begun
                self._in_calls = True
                return True
        before, mark, after = self._held.partition(self._begin)
        if mark:
            self._say(before)
            self._held = after
            self._in_calls = True
            return True
        keep = next((n for n in range(len(self._begin) - 1, 0, -1) if self._held.endswith(self._begin[:n])), 0)
        self._say(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _between_calls(self) -> bool:
        brace = self._held.find("{")
        end = self._held.find(self._end) if self._end else -1
        if end >= 0 and (brace < 0 or end < brace):
            self._in_calls = False
            self._is_after_call = True
            self._held = self._held[end + len(self._end) :]
            return True
        if brace < 0:
            return False
        named = _NAMED_BEFORE.search(self._held[:brace])
        self._scanner = CallScanner(named[1] if named else None)
        self._call_index = -1
        self._held = self._held[brace:]
        return True

    def _scan(self, scanner: CallScanner) -> bool:
        read = scanner.push(self._held)
        self._held = self._held[read:]
        delta = scanner.delta()
        is_unknown = self._style == "llama3" and scanner.name is not None and scanner.name not in self._names
        if scanner.has_failed or (is_unknown and self._call_index < 0):
            self._scanner = None
            self._in_calls = self._style is None
            self._say(scanner.text)
            return bool(self._held)
        if delta is not None and (self._parallel or self.num_calls == 0 or self._call_index == 0):
            function: dict[str, object] = {"arguments": delta.arguments}
            call: dict[str, object] = {"index": self._call_index, "function": function}
            if delta.name is not None:
                self._call_index = self.num_calls
                self.num_calls += 1
                call = {"index": self._call_index, "id": self._new_id(), "type": "function"}
                call["function"] = {"name": delta.name, "arguments": delta.arguments}
            self._deltas.calls.append(call)
        if scanner.is_done:
            self._scanner = None
        return bool(self._held)

    def _say(self, text: str) -> None:
        self._deltas.content += text

    def _new_id(self) -> str:
        if self._style == "mistral":  # its templates refuse any other length
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
