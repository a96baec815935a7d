"""Server-sent events, from bytes as the network cuts them. https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import re

__all__ = ["SseParser"]

_LINE_END = re.compile(rb"\r\n|\n|\r")


class SseParser:
    """Finds the events of one stream. Comments are skipped; the lines of one event are joined by newlines."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that `data` completes."""
        text = self._rest + data
        # A trailing \r may be the first half of \r\n: its line waits.
        held = b"\r" if text.endswith(b"\r") else b""
        *lines, last = _LINE_END.split(text[:-1] if held else text)
        self._rest = last + held
        events: list[bytes] = []
        for line in lines:
            self._take(line, events)
        return events

    def close(self) -> list[bytes]:
        """What the stream's end completes: some servers leave out the last empty line."""
        events: list[bytes] = []
        self._take(self._rest.rstrip(b"\r"), events)
        self._rest = b""
        self._take(b"", events)
        return events

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data = []
            return
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if name == b"data":
            self._data.append(value)
        elif name == b"error":  # llama.cpp reports a failure in a field of its own
            self._data.append(b'{"error":' + value + b"}")
