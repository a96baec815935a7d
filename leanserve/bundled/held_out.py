"""Documents to measure with: ten facts at ten depths each, from seeds that are never trained on. Needs no torch."""

from dataclasses import dataclass

from leanserve.bundled.corpus import Haystack, make_haystack
from leanserve.bundled.grammar import Fact

__all__ = ["DEPTHS", "KINDS", "LENGTHS_TOKENS", "Kind", "held_out", "question_and_answer"]

DEPTHS = tuple((i + 0.5) / 10 for i in range(10))
LENGTHS_TOKENS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)


@dataclass(frozen=True)
class Kind:
    """What stands in a document beside its facts and filler."""

    distractors: int
    """Per fact."""
    updated: bool
    """Every fact was told before, with another value."""
    lengths_tokens: tuple[int, ...]
    """Fifty facts do not fit into 512 tokens, and 32k tokens of every kind take too long on a CPU."""


KINDS = {
    "plain": Kind(0, False, LENGTHS_TOKENS),
    "distractors": Kind(4, False, LENGTHS_TOKENS[1:-1]),
    "distractors_and_updates": Kind(2, True, LENGTHS_TOKENS[1:-1]),
}
"""`make_prompt` writes four distractors, and nothing is overruled."""


def held_out(tokens: int, number: int, kind: Kind = KINDS["plain"]) -> Haystack:
    """Document `number` of this length and kind."""
    seed = f"held out/{tokens}/{number}"
    distractors = kind.distractors * len(DEPTHS)
    return make_haystack(tokens, DEPTHS, seed, distractors=distractors, updated=kind.updated)


def question_and_answer(fact: Fact) -> tuple[str, str]:
    """What to append to a document to ask for a fact, and the completion that is right."""
    return f"\nQuestion: {fact.question}\nAnswer:", f" {fact.answer_clause} {fact.value}."
