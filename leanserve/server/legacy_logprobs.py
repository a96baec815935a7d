"""The `logprobs` object of /v1/completions, as OpenAI's legacy API writes it."""

from collections.abc import Sequence
from typing import Any

from leanserve.contracts.logprobs import Logprobs, TokenLogprobs
from leanserve.server.token_texts import TokenTexts

__all__ = ["LegacyLogprobs"]

_LEAST = -9999.0
"""JSON has no infinity."""


class LegacyLogprobs:
    """Writes the tokens of one choice in their order, in as many parts as they come.

    `text_offset` counts characters of the choice's `text` (that of all chunks together): where the token's first byte
    stands, or the character that it goes on with.

    Args:
        shows_special: special tokens are part of the text.
    """

    def __init__(self, texts: TokenTexts, *, shows_special: bool) -> None:
        self._texts = texts
        self._shows_special = shows_special
        self._offset = 0

    def prompt(self, token_ids: Sequence[int], logprobs: Logprobs | None, text: str) -> dict[str, list[Any]]:
        """The prompt's tokens, where they come first. Nothing precedes the first one: it has null, and is not in
        `logprobs`, which is None for a prompt of one token.

        Args:
            text: of the prompt. Some tokenizers drop a leading space of the first token.
        """
        first = next((t for t in token_ids if self._shows(t)), None)
        if first is not None and self._texts.bytes_of(first).startswith(b" ") and not text.startswith(" "):
            self._offset = -1
        return self._write(token_ids, [None, *(logprobs.rows() if logprobs is not None else [])])

    def part(self, token_ids: Sequence[int], logprobs: Logprobs) -> dict[str, list[Any]]:
        """The next tokens."""
        return self._write(token_ids, logprobs.rows())

    def _write(self, token_ids: Sequence[int], rows: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        tokens = [self._texts.text_of(token_id) for token_id in token_ids]
        return {
            "tokens": tokens,
            "token_logprobs": [None if row is None else max(row.logprob, _LEAST) for row in rows],
            "top_logprobs": [
                None if row is None else self._top(token, row) for token, row in zip(tokens, rows, strict=True)
            ],
            "text_offset": [max(self._place(token_id), 0) for token_id in token_ids],
        }

    def _top(self, token: str, row: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the token itself where it is not one of them. Of several that are written alike,
        the most likely one stands."""
        top: dict[str, float] = {}
        for token_id, logprob in row.top:
            top.setdefault(self._texts.text_of(token_id), max(logprob, _LEAST))
        top.setdefault(token, max(row.logprob, _LEAST))
        return top

    def _place(self, token_id: int) -> int:
        """Where a token stands; the place moves on behind it."""
        if not self._shows(token_id):
            return self._offset
        raw = self._texts.bytes_of(token_id)
        starts = sum(byte & 0xC0 != 0x80 for byte in raw)  # characters that begin in it
        place = self._offset - (1 if raw and raw[0] & 0xC0 == 0x80 and self._offset else 0)
        self._offset += starts
        return place

    def _shows(self, token_id: int) -> bool:
        return self._shows_special or not self._texts.is_special(token_id)
