"""Training batches: documents of the corpus as tokens, with what the loss and the attention mask need to know.

A training document is a body of sentences, then questions with their answers. Sequences of a level all have one
length, so nothing is padded. Two things stand in for length that costs nothing to compute:

- positions jump ahead at a few places, so that rope layers meet distances up to `FARTHEST_TOKENS` in short documents;
- filler counts n-fold: a key that stood n times in a document would have its attention weight n times, that is
  log n added to its logit. So a document of 1,024 tokens dilutes attention as one of n x 1,024 does.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from leanserve.bundled.grammar import STYLES, Fact, Writer

__all__ = ["Batch", "Batches", "Level"]

FILLER, FACT, REPLY, ANSWER = range(4)
"""What a token belongs to; an answer's value is part of a reply."""
FARTHEST_TOKENS = 40_000
QUESTION_TOKENS = 22
"""About what a question and its answer take."""
NEAR_TOKENS = 64
"""Keys this close to a query are never diluted: a long document does not repeat them."""


@dataclass(frozen=True)
class Level:
    """How hard the documents are."""

    tokens: int
    batch: int
    """Sequences in one step."""
    filler: tuple[float, float]
    """Share of filler among the body's sentences, drawn between these per document."""
    questions: float
    """Share of the tokens that questions and answers take."""
    updates: float = 0.1
    """Share of updates among sentences that are not filler."""
    distractors: float = 0.3
    """Share of distractors among sentences that are not filler."""
    dilution: float = 1.0
    """Filler counts up to this many times."""
    jumps: int = 0
    """At most this many jumps in position."""
    once: bool = False
    """No fact is asked twice, as the second answer can be copied from the first; the body is longer instead."""


@dataclass(frozen=True)
class Batch:
    ids_BL: Tensor
    positions_BL: Tensor
    answer_BL: Tensor
    """bool: this token belongs to an answer's value; no model without retrieval predicts it."""
    reply_BL: Tensor
    """bool: this token belongs to a question or answer."""
    mask_B1LL: Tensor | None
    """Causal mask with dilution; None where nothing is diluted."""


class Batches:
    """Writes the batch of a step. Equal (seed, step, level) give equal batches."""

    def __init__(self, tokenizer: Tokenizer, seed: str) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._known: dict[str, list[int]] = {}

    def batch(self, level: Level, step: int, device: torch.device) -> Batch:
        """The batch of `step`."""
        rng = random.Random(f"{self._seed}/{step}")
        rows = [self._row(level, rng) for _ in range(level.batch)]
        kinds_BL = torch.tensor([row[1] for row in rows], device=device)
        positions_BL = torch.arange(level.tokens, device=device).repeat(level.batch, 1)
        for i in range(level.batch):
            for _ in range(rng.randint(0, level.jumps)):
                size = math.exp(rng.uniform(0, math.log(FARTHEST_TOKENS / max(1, level.jumps))))
                positions_BL[i, rng.randrange(1, level.tokens) :] += int(size)
        return Batch(
            torch.tensor([row[0] for row in rows], device=device),
            positions_BL,
            kinds_BL == ANSWER,
            kinds_BL >= REPLY,
            self._mask(level, kinds_BL, rng) if level.dilution > 1 else None,
        )

    def _mask(self, level: Level, kinds_BL: Tensor, rng: random.Random) -> Tensor:
        # Half of the documents as they are, the others diluted by a factor drawn log-uniformly.
        logs = [rng.choice((0.0, rng.uniform(0, math.log(level.dilution)))) for _ in range(level.batch)]
        bias_BL = torch.tensor(logs, device=kinds_BL.device)[:, None] * (kinds_BL == FILLER)
        at = torch.arange(level.tokens, device=kinds_BL.device)
        distance_LL = at[:, None] - at
        mask_BLL = bias_BL[:, None, :] * (distance_LL >= NEAR_TOKENS)
        return mask_BLL.masked_fill_(distance_LL < 0, -math.inf)[:, None]

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]

    def _row(self, level: Level, rng: random.Random) -> tuple[list[int], list[int]]:
        ids, kinds = list(self._tokenizer.encode("").ids), [FILLER]

        def add(text: str, kind: int) -> None:
            new = self._encode(text)
            ids.extend(new)
            kinds.extend([kind] * len(new))

        facts = self._body(level, rng, add, lambda: len(ids))
        asked: list[Fact] = []
        while len(ids) < level.tokens:
            asked = asked or rng.sample(facts, len(facts))
            fact = asked.pop()
            add("\nQuestion:", REPLY)
            add(f" {fact.question}", REPLY)
            add("\nAnswer:", REPLY)
            add(f" {fact.answer_clause}", REPLY)
            add(f" {fact.value}", ANSWER)
            add(".<|end|>", REPLY)
        return ids[: level.tokens], kinds[: level.tokens]

    def _room_for_questions(self, level: Level, facts: int) -> float:
        room = level.tokens * level.questions
        return min(room, facts * QUESTION_TOKENS) if level.once else room

    def _body(
        self, level: Level, rng: random.Random, add: Callable[[str, int], None], written: Callable[[], int]
    ) -> list[Fact]:
        """Writes the body; returns the facts that hold at its end."""
        writer = Writer(rng, rng.choice(STYLES))
        share = rng.uniform(*level.filler)
        facts: list[Fact] = []
        add(writer.header(), FILLER)
        sentences = 0
        while not facts or written() < level.tokens - self._room_for_questions(level, len(facts)):
            if sentences % 6 == 0:
                add(f"\n{writer.opener()}", FILLER)
            sentences += 1
            if rng.random() < share:
                add(f" {writer.filler()}", FILLER)
                continue
            chance = rng.random()
            if facts and chance < level.updates:
                i = rng.randrange(len(facts))
                if facts[i].overrules:
                    continue
                fact = facts[i] = writer.update(facts[i])
            else:
                resembling = facts and chance < level.updates + level.distractors
                fact = writer.distractor(rng.choice(facts)) if resembling else writer.fact()
                facts.append(fact)
            add(f" {writer.state(fact)}", FACT)
        return facts
