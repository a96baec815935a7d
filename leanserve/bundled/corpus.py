"""Documents of an exact length in tokens, with facts at given depths: readable English to look for needles in.

A document is a header and paragraphs of the sentences that `grammar` writes. Equal seeds give equal text on every
machine. Needs the bundled tokenizer; knows no model.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from leanserve.bundled import bundled_model_dir
from leanserve.bundled.grammar import STYLES, Fact, Writer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Haystack", "NeedlePrompt", "make_haystack", "make_prompt"]

LANDING_TOKENS = 64
"""Filler is drawn freely until at most this many tokens are missing; then sentences are chosen that sum up exactly."""


@dataclass(frozen=True)
class Haystack:
    """A document that holds facts among filler. It ends with a whole sentence."""

    text: str
    facts: tuple[Fact, ...]
    """As they hold at the document's end."""
    depths: tuple[float, ...]
    """Where each fact stands, as asked for."""
    starts: tuple[int, ...]
    """Index of the first token of the sentence that tells each fact; the tokenizer's leading token counts."""
    ends: tuple[int, ...]
    """Index behind the last token of that sentence."""


@dataclass(frozen=True)
class NeedlePrompt:
    """A long document, a question about one sentence of it, and what a correct completion says."""

    text: str
    """Ends with "Answer:"."""
    question: str
    answer: str
    """A completion is right when it contains this."""
    fact_token: int
    """Index of the first token of the sentence that holds the answer; the tokenizer's leading token counts."""
    fact_end: int
    """Index behind the last token of that sentence."""


def make_prompt(
    tokens: int = 32_768, depth: float = 0.35, seed: int = 7, *, distractors: int = 4, updated: bool = False
) -> NeedlePrompt:
    """A prompt of exactly `tokens` tokens of the bundled tokenizer, its leading token included.

    depth: where the fact stands, as a share of the filler before it, 0 to 1; to the nearest sentence.
    distractors: sentences that resemble the fact, spread evenly over the document.
    updated: the fact overrules one told at half its depth; the answer is the newer value.

    Raises ValueError when a number is out of range or the sentences do not fit.
    """

    def ask(facts: tuple[Fact, ...]) -> str:
        return f"\nQuestion: {facts[0].question}\nAnswer:"

    haystack = make_haystack(tokens, (depth,), f"needle/{seed}", distractors=distractors, updated=updated, ending=ask)
    (fact,) = haystack.facts
    return NeedlePrompt(haystack.text, fact.question, fact.value, haystack.starts[0], haystack.ends[0])


def make_haystack(
    tokens: int,
    depths: Sequence[float],
    seed: str,
    *,
    distractors: int = 0,
    updated: bool = False,
    ending: Callable[[tuple[Fact, ...]], str] = lambda facts: "",
) -> Haystack:
    """A document of exactly `tokens` tokens, with a fact at each of `depths`; the rest is as in `make_prompt`.

    ending: writes the document's last piece, which must start at a newline or a space; its tokens count.
    """
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"depth is {outside[0]}; it must be between 0 (first sentence) and 1 (last sentence)")
    if distractors < 0:
        raise ValueError(f"distractors is {distractors}; it must be at least 0")
    rng = random.Random(seed)
    writer = Writer(rng, rng.choice(STYLES))
    first_told = [writer.fact() for _ in depths]
    facts = tuple(writer.update(fact) for fact in first_told) if updated else tuple(first_told)
    # What is overruled comes first, so that at depth 0 too it is told before its update.
    told = [(depth / 2, fact) for depth, fact in zip(depths, first_told, strict=True)] if updated else []
    told += zip(depths, facts, strict=True)
    told += [((i + 0.5) / distractors, writer.distractor(facts[i % len(facts)])) for i in range(distractors)]
    told.sort(key=lambda item: item[0])

    tokenizer = _bundled_tokenizer()

    def count(text: str) -> int:
        # Every piece starts at a space or a newline, where the pre-tokenizer always splits: counts add up.
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    head, tail = f"{writer.header()}\n{writer.opener()}", ending(facts)
    sentences = [f" {writer.state(fact)}" for _, fact in told]
    at = len(tokenizer.encode(head).ids)
    room = tokens - at - count(tail) - sum(map(count, sentences))
    if room < LANDING_TOKENS:
        raise ValueError(
            f"tokens is {tokens}; the ending and {len(told)} facts need at least {tokens - room + LANDING_TOKENS}"
        )
    text, filled = [head], 0
    places: dict[Fact, tuple[int, int]] = {}
    filler = deque(_filler_of(room, writer, count))
    for (depth, fact), sentence in zip(told, sentences, strict=True):
        while filler and filled + filler[0][1] / 2 < depth * room:
            piece, size = filler.popleft()
            text.append(piece)
            filled, at = filled + size, at + size
        text.append(sentence)
        places[fact] = at, at + count(sentence)
        _, at = places[fact]
    text += [piece for piece, _ in filler]
    starts, ends = zip(*(places[fact] for fact in facts), strict=True) if facts else ((), ())
    return Haystack("".join([*text, tail]), facts, tuple(depths), starts, ends)


@cache
def _bundled_tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(bundled_model_dir() / "tokenizer.json"))


def _filler_of(tokens: int, writer: Writer, count: Callable[[str], int]) -> list[tuple[str, int]]:
    """Filler sentences, each with its token count, of `tokens` tokens together."""
    pieces: list[tuple[str, int]] = []
    left = tokens
    while left > LANDING_TOKENS:
        lead = f"\n{writer.opener()}" if len(pieces) % 6 == 5 else ""
        piece = f"{lead} {writer.filler()}"
        size = count(piece)
        if size > left:
            break
        pieces.append((piece, size))
        left -= size
    # ways[n]: sentences of n tokens together, found by adding one sentence at a time to what is reachable already.
    drawn = [f" {writer.filler()}" for _ in range(100)]
    ways: dict[int, list[tuple[str, int]]] = {0: []}
    for piece in drawn:
        size = count(piece)
        for reached, way in sorted(ways.items()):
            if reached + size <= left and reached + size not in ways:
                ways[reached + size] = [*way, (piece, size)]
        if left in ways:
            return pieces + ways[left]
    raise RuntimeError(f"no filler sentences sum up to {left} tokens; the tokenizer is not the bundled one")
