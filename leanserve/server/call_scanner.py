"""Function calls out of JSON that is still being written: names and arguments as soon as they are there."""

import json
from dataclasses import dataclass

__all__ = ["CallDelta", "CallScanner"]

_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of a call: first its name, then pieces of its arguments, which are JSON together."""

    name: str | None
    arguments: str


class CallScanner:
    """Reads one object, `{"name": ..., "arguments": {...}}`, character by character.

    Args:
        name: given where the object is the arguments alone.
    """

    def __init__(self, name: str | None = None) -> None:
        self.is_done = False
        self.has_failed = False
        """It is done, and no call: no name, or no JSON."""
        self.text = ""
        """All that was read."""
        self.name = name
        self._is_arguments = name is not None
        self._tells_name = name is not None
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._key: str | None = None
        self._value = ""  # at depth 1: of the key, or of the value that follows it
        self._arguments = ""
        self._told = 0

    def push(self, text: str) -> int:
        """Read up to the object's end, or all of `text`, which must begin with its brace. Returns how much was read."""
        for place, char in enumerate(text):
            self._read(char)
            if self.is_done:
                self.text += text[: place + 1]
                self._check()
                return place + 1
        self.text += text
        return len(text)

    def delta(self) -> CallDelta | None:
        """What has become known since the last time."""
        if self.name is None or self.has_failed:
            return None
        new = self._arguments[self._told :]
        if not new and not self._tells_name:
            return None
        self._told = len(self._arguments)
        name, self._tells_name = self.name if self._tells_name else None, False
        return CallDelta(name, new)

    def _read(self, char: str) -> None:
        if self._is_arguments:
            self._arguments += char
        if self._in_string:
            self._keep(char)
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return
        if char == '"':
            self._in_string = True
            self._keep(char)
        elif char in "{[":
            self._depth += 1
            if self._depth > 1:
                self._keep(char)
        elif char in "}]":
            self._depth -= 1
            if self._depth > 0:
                self._keep(char)
            else:
                self._end_value()
                self.is_done = True
        elif self._depth == 1 and char == ":" and self._key is None:
            self._key = self._loaded(self._value)
            self._value = ""
        elif self._depth == 1 and char == ",":
            self._end_value()
        elif self._value or char not in _SPACE:
            self._keep(char)

    def _keep(self, char: str) -> None:
        self._value += char
        if self._key in _ARGUMENTS and not self._is_arguments and self._value[0] == "{":
            self._arguments += char

    def _end_value(self) -> None:
        key, value, self._key, self._value = self._key, self._value, None, ""
        if self._is_arguments or key is None:
            return
        if key in _NAMES and self.name is None:
            self.name = self._loaded(value)
            self._tells_name = self.name is not None
        elif key in _ARGUMENTS and not self._arguments:  # some models write them as a string of JSON, or as null
            self._arguments = self._loaded(value) or ""

    def _check(self) -> None:
        try:
            json.loads(self.text)
        except (ValueError, RecursionError):
            self.has_failed = not self._told
        if self.name is None:
            self.has_failed = True
        elif not self._arguments.strip():
            self._arguments = "{}"

    @staticmethod
    def _loaded(value: str) -> str | None:
        """A JSON string's text; None for anything else."""
        try:
            loaded = json.loads(value)
        except ValueError:
            return None
        return loaded if isinstance(loaded, str) else None
