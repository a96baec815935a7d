"""Prompts of an exact length, as the JSON that goes on the wire: joining two of them is joining bytes.

Prompts of token ids have their length by construction. Texts are written for the bundled tokenizer; another model's
tokenizer cuts them otherwise, and the server's own count says how.
"""

import random
from dataclasses import dataclass
from typing import Literal

import orjson

from leanserve.bundled.corpus import make_haystack, make_prompt
from leanserve.contracts.errors import ConfigError

__all__ = ["Prompt", "PromptKind", "TokenRange", "answer_part", "ids_prompt", "needle_prompt", "text_prompt"]

PromptKind = Literal["ids", "text"]


@dataclass(frozen=True)
class Prompt:
    """A prompt, or what a turn adds to one."""

    kind: PromptKind
    fragment: bytes
    """Ids: `1,2,3`. Text: the inside of a JSON string, without its quotes."""
    tokens: int
    """As asked for."""

    def __add__(self, other: "Prompt") -> "Prompt":
        if not self.fragment or not other.fragment:
            return other if not self.fragment else self
        between = b"," if self.kind == "ids" else b""
        return Prompt(self.kind, self.fragment + between + other.fragment, self.tokens + other.tokens)


@dataclass(frozen=True)
class TokenRange:
    """Ids that random prompts are made of: ordinary tokens in every common vocabulary."""

    first: int = 1000
    last: int = 1999

    @classmethod
    def parse(cls, text: str) -> "TokenRange":
        """Read FIRST-LAST.

        Raises:
            ConfigError: it is no range.
        """
        first, _, last = text.partition("-")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ConfigError(f"--token-range is {text!r}; give the first and the last token id, such as 1000-1999")
        return cls(int(first), int(last))


def ids_prompt(tokens: int, key: str, ids: TokenRange) -> Prompt:
    """Random token ids; equal keys give equal ids."""
    rng = random.Random(key)
    words = [str(token_id).encode() for token_id in range(ids.first, ids.last + 1)]
    return Prompt("ids", b",".join(rng.choices(words, k=tokens)), tokens)


def text_prompt(tokens: int, key: str) -> Prompt:
    """Sentences of the bundled corpus, `tokens` of the bundled tokenizer.

    Raises:
        ConfigError: too few tokens to write a text.
    """
    try:
        text = make_haystack(tokens, (), key).text
    except ValueError as error:
        raise ConfigError(f"a text prompt of {tokens} tokens cannot be written: {error}") from None
    return Prompt("text", _inside(text), tokens)


def needle_prompt(tokens: int, depth: float, seed: int) -> tuple[Prompt, str]:
    """A document with a fact at `depth` and a question about it; and what a right answer contains.

    Raises:
        ConfigError: too few tokens to hold it.
    """
    try:
        needle = make_prompt(tokens, depth, seed, distractors=0)
    except ValueError as error:
        raise ConfigError(f"a needle prompt of {tokens} tokens cannot be written: {error}") from None
    return Prompt("text", _inside(needle.text), tokens), needle.answer


def answer_part(kind: PromptKind, token_ids: list[int], text: str, tokens: int) -> Prompt:
    """What a server generated, as a part of the next turn's prompt."""
    if kind == "text":
        return Prompt("text", _inside(text), tokens)
    return Prompt("ids", b",".join([str(token_id).encode() for token_id in token_ids]), len(token_ids))


def _inside(text: str) -> bytes:
    return orjson.dumps(text)[1:-1]
