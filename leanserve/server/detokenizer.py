"""Tokens to text as they come: characters that span tokens, and stop strings that span tokens.

Serves HTTP and the offline face alike; knows nothing of either.
"""

from collections.abc import Sequence

from leanserve.server.tokenizer import Tokenizer

__all__ = ["TextStream"]

_CONTEXT_TOKENS = 6
"""Prompt tokens that give the first output token its left neighbour (decoders drop a leading space, for one)."""

_MAX_HELD_TOKENS = 16
"""Tokens that may wait for a character to be complete. UTF-8 needs four; a model that emits bytes which never become
text must not make every step decode a longer run."""

_REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one completion.

    The window of tokens that is decoded is short and starts at a character's border, so a step costs the same however
    long the completion is. (`tokenizers.decoders.DecodeStream` decodes an ever longer run of bytes that are not UTF-8,
    8,000 of them in 5 s, and raises on byte-fallback vocabularies.)

    Args:
        tokenizer: decodes.
        stop: strings that end the text. It ends before the first of them, by the place where it is complete.
        prompt_token_ids: the prompt, or its last tokens.
        skip_special_tokens: leave out tokens such as `</s>`.
        include_stop: end the text after the stop string instead.
        min_tokens: a stop string that is complete before so many tokens is only text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._max_held_chars = max((len(s) for s in self._stop), default=1) - 1
        self._held_text = ""  # decoded, and may be the beginning of a stop string
        self._shown = self._context(prompt_token_ids)  # tokens whose text is out: the left neighbour of ...
        self._shown_text = self._decode(self._shown)
        self._waiting: list[int] = []  # ... tokens whose text is not
        self.stop_string: str | None = None
        """The stop string that was found."""

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """New tokens in, new text out, and whether a stop string has been found; nothing may be pushed after that."""
        self._num_tokens += len(token_ids)
        return self._scan("".join([self._advance(token_id) for token_id in token_ids]))

    def finish(self) -> str:
        """The text still held back, when no more tokens come. Empty after a stop string."""
        if self.stop_string is not None:
            return ""
        rest = self._decode(self._shown + self._waiting)[len(self._shown_text) :] if self._waiting else ""
        text, stopped = self._scan(rest)
        if not stopped:
            text, self._held_text = text + self._held_text, ""
        self._waiting = []
        return text

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from a character's border on."""
        tail: list[int] = []
        for count in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + 4):
            tail = list(prompt_token_ids[-count:])
            if not self._decode(tail).startswith(_REPLACEMENT):
                break
        return tail

    def _decode(self, token_ids: list[int]) -> str:
        if len(token_ids) == 1:
            return self._tokenizer.decode_one(token_ids[0], skip_special_tokens=self._skip_special_tokens)
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _advance(self, token_id: int) -> str:
        self._waiting.append(token_id)
        text = self._decode(self._shown + self._waiting)
        is_complete = len(text) > len(self._shown_text) and not text.endswith(_REPLACEMENT)
        if not is_complete and len(self._waiting) < _MAX_HELD_TOKENS:
            return ""
        new = text[len(self._shown_text) :]
        if new:  # otherwise tokens without text, which are nobody's left neighbour
            self._shown, self._shown_text = self._waiting, self._decode(self._waiting)
        self._waiting = []
        return new

    def _scan(self, new: str) -> tuple[str, bool]:
        """Find the stop string that is complete first (of those, the one that begins first), or let safe text go."""
        text = self._held_text + new
        found: tuple[int, int, str] | None = None
        for stop in self._stop if self._num_tokens >= self._min_tokens else ():
            start = text.find(stop)
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                found = candidate if found is None else min(found, candidate)
        if found is not None:
            end, start, self.stop_string = found
            self._held_text = ""
            return text[: end if self._include_stop else start], True
        held = self._held_chars(text)
        self._held_text = text[len(text) - held :]
        return text[: len(text) - held], False

    def _held_chars(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        first = max(0, len(text) - self._max_held_chars)
        for stop in self._stop:
            start = text.find(stop[0], max(first, len(text) - len(stop) + 1))
            while start >= 0:
                if stop.startswith(text[start:]):
                    longest = max(longest, len(text) - start)
                    break
                start = text.find(stop[0], start + 1)
        return longest
