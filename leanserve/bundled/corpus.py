"""A seeded grammar of readable English: a ship's log, an inventory, a diary, with facts to be found again.

A document is a header and paragraphs of sentences. Most sentences are filler. Some state a `Fact` ("the brass key is in
locker 4821"); a *distractor* resembles a fact and differs in one word of its subject or in what it tells; an *update*
overrules an earlier fact ("Correction: the brass key is now in locker 7730."). A question names the subject in the
fact's own words, and its answer restates the fact.

Equal seeds give equal text on every machine. This module knows no model; only `make_prompt`, which counts
tokens, reads a tokenizer.
"""

import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from leanserve.bundled import bundled_model_dir
from leanserve.bundled.words import (
    COLOURS,
    CONTAINERS,
    DAYS,
    FILLER,
    FIRST_NAMES,
    GOODS,
    LAST_NAMES,
    MATERIALS,
    MONTHS,
    OBJECTS,
    PORTS,
    SLOTS,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "RELATIONS",
    "STYLES",
    "Fact",
    "Haystack",
    "NeedlePrompt",
    "Writer",
    "corpus_words",
    "make_haystack",
    "make_prompt",
]

STYLES = ("log", "inventory", "diary")


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how it is stated, overruled and asked for."""

    subject: str
    """Words that name the thing, with slots {a} and {b}."""
    clause: str
    """Everything before the value, with the slot {subject}."""
    updated: str
    """The same in a sentence that overrules an earlier one."""
    question: str
    heads: tuple[str, ...]
    """Fillers of {a}."""
    tails: tuple[str, ...]
    """Fillers of {b}."""
    value: Callable[[random.Random], str]


def _code(rng: random.Random) -> str:
    return f"{rng.randrange(10_000):04d}"


RELATIONS: dict[str, Relation] = {
    "place": Relation(
        "the {a} {b}",
        "{subject} is in",
        "{subject} is now in",
        "Where is {subject}?",
        (*MATERIALS, *COLOURS),
        tuple(OBJECTS),
        lambda rng: f"{rng.choice(CONTAINERS)} {_code(rng)}",
    ),
    "code": Relation(
        "the code of {a} {b}",
        "{subject} is",
        "{subject} is now",
        "What is {subject}?",
        tuple(FIRST_NAMES),
        tuple(LAST_NAMES),
        _code,
    ),
    "stock": Relation(
        "the stock of {a} {b}",
        "{subject} is",
        "{subject} is now",
        "What is {subject}?",
        tuple(COLOURS),
        tuple(GOODS),
        _code,
    ),
    "owner": Relation(
        "the {a} {b}",
        "{subject} belongs to",
        "{subject} now belongs to",
        "Who does {subject} belong to?",
        (*MATERIALS, *COLOURS),
        tuple(OBJECTS),
        lambda rng: f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
    ),
    "port": Relation(
        "the {a} {b}",
        "{subject} was bought in",
        "{subject} was really bought in",
        "Where was {subject} bought?",
        (*MATERIALS, *COLOURS),
        tuple(OBJECTS),
        lambda rng: rng.choice(PORTS),
    ),
    "date": Relation(
        "the {a} {b}",
        "{subject} was lost on",
        "{subject} was really lost on",
        "When was {subject} lost?",
        (*MATERIALS, *COLOURS),
        tuple(OBJECTS),
        lambda rng: f"{rng.randrange(1, 29)} {rng.choice(MONTHS)}",
    ),
}

# What may stand before a stated clause; "" starts the sentence with the clause itself.
LEADS: dict[str, tuple[str, ...]] = {
    "log": ("", "", "{first} noted that ", "For the record, "),
    "inventory": ("", "", "Checked by {first}: ", "Note that "),
    "diary": ("", "", "{first} told me that ", "I must remember that "),
}
HEADERS = {"log": "Log of the {ship}", "inventory": "Inventory of the {ship}", "diary": "Diary of {first}"}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Fact:
    """One thing that a document tells, and that can be asked for."""

    relation: str
    """A key of `RELATIONS`."""
    a: str
    b: str
    value: str
    """The answer: "locker 4821", "Mara Voss", "14 March"."""
    overrules: bool = False
    """Stated as a correction of an earlier fact on the same subject."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a question names. Two facts of one key contradict each other."""
        return self.relation, self.a, self.b

    @property
    def subject(self) -> str:
        return RELATIONS[self.relation].subject.format(a=self.a, b=self.b)

    @property
    def clause(self) -> str:
        """The statement up to its value."""
        relation = RELATIONS[self.relation]
        return (relation.updated if self.overrules else relation.clause).format(subject=self.subject)

    @property
    def question(self) -> str:
        return RELATIONS[self.relation].question.format(subject=self.subject)

    @property
    def answer_clause(self) -> str:
        """The answer's sentence up to the value; an update is answered like any fact."""
        return _capital(RELATIONS[self.relation].clause.format(subject=self.subject))


class Writer:
    """Writes the sentences of one document. Sentences and openers come without surrounding spaces.

    `rng` alone decides what is written. A writer remembers the keys of its facts, so that no two contradict.
    """

    def __init__(self, rng: random.Random, style: str) -> None:
        if style not in STYLES:
            raise ValueError(f"style is {style!r}; allowed are {', '.join(STYLES)}")
        self.rng = rng
        self.style = style
        self._keys: set[tuple[str, str, str]] = set()
        self._entry = rng.randrange(1, 100)
        self._day, self._month, self._weekday = rng.randrange(28), rng.randrange(12), rng.randrange(7)

    def header(self) -> str:
        """The document's title line."""
        return self._fill(HEADERS[self.style])

    def opener(self) -> str:
        """What starts the next paragraph: a date, or the number of an entry."""
        if self.style == "inventory":
            self._entry = self._entry % 99 + 1
            return f"Entry {self._entry}."
        self._day, self._weekday = self._day + 1, (self._weekday + 1) % 7
        if self._day > 28:
            self._day, self._month = 1, (self._month + 1) % 12
        return f"{DAYS[self._weekday]}, {self._day} {MONTHS[self._month]}."

    def filler(self) -> str:
        """A sentence that tells nothing that is ever asked for."""
        return _capital(self._fill(self.rng.choice(FILLER[self.style])))

    def fact(self) -> Fact:
        """A fact about something new to this document."""
        name = self.rng.choice(list(RELATIONS))
        relation = RELATIONS[name]
        choose = self.rng.choice
        return self._new(lambda: Fact(name, choose(relation.heads), choose(relation.tails), relation.value(self.rng)))

    def distractor(self, fact: Fact) -> Fact:
        """A fact that shares all but one word of `fact`'s subject, or tells something else of the same thing."""

        def resemble() -> Fact:
            relation = RELATIONS[fact.relation]
            kin = [name for name, other in RELATIONS.items() if other.subject == relation.subject]
            change = self.rng.choice("abr" if len(kin) > 1 else "ab")
            if change == "a":
                return replace(fact, a=self.rng.choice(relation.heads), value=relation.value(self.rng), overrules=False)
            if change == "b":
                return replace(fact, b=self.rng.choice(relation.tails), value=relation.value(self.rng), overrules=False)
            name = self.rng.choice(kin)
            return replace(fact, relation=name, value=RELATIONS[name].value(self.rng), overrules=False)

        return self._new(resemble)

    def update(self, fact: Fact) -> Fact:
        """The fact that overrules `fact`: another value for the same question."""
        value = fact.value
        while value == fact.value:
            value = RELATIONS[fact.relation].value(self.rng)
        return replace(fact, value=value, overrules=True)

    def state(self, fact: Fact) -> str:
        """A sentence that tells `fact`."""
        if fact.overrules:
            return f"Correction: {fact.clause} {fact.value}."
        return _capital(f"{self._fill(self.rng.choice(LEADS[self.style]))}{fact.clause} {fact.value}.")

    def _new(self, draw: Callable[[], Fact]) -> Fact:
        for _ in range(10_000):
            fact = draw()
            if fact.key not in self._keys:
                self._keys.add(fact.key)
                return fact
        raise ValueError(f"no subject is left for another such fact; the document tells {len(self._keys)} already")

    def _fill(self, template: str) -> str:
        pieces = template.split("{")
        filled = [pieces[0]]
        for piece in pieces[1:]:
            slot, rest = piece.split("}", 1)
            filled += [self.rng.choice(SLOTS[slot]), rest]
        return "".join(filled)


@cache
def corpus_words() -> set[str]:
    """Every word that the grammar can write, in lower case, numbers left out."""
    pools = (
        *(text for texts in (*SLOTS.values(), *FILLER.values(), *LEADS.values()) for text in texts),
        *(
            text
            for r in RELATIONS.values()
            for text in (r.subject, r.clause, r.updated, r.question, *r.heads, *r.tails)
        ),
        *(*HEADERS.values(), *CONTAINERS, *PORTS, *MONTHS, *DAYS, "Entry", "Correction", "Question", "Answer"),
    )
    return {word for text in pools for word in re.findall(r"[a-z]+", re.sub("{.*?}", " ", text).lower())}


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
    return NeedlePrompt(haystack.text, fact.question, fact.value, haystack.starts[0])


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
    text, filled, starts = [head], 0, {}
    filler = deque(_filler_of(room, writer, count))
    for (depth, fact), sentence in zip(told, sentences, strict=True):
        while filler and filled + filler[0][1] / 2 < depth * room:
            piece, size = filler.popleft()
            text.append(piece)
            filled, at = filled + size, at + size
        starts[fact] = at
        text.append(sentence)
        at += count(sentence)
    text += [piece for piece, _ in filler]
    return Haystack("".join([*text, tail]), facts, tuple(depths), tuple(starts[fact] for fact in facts))


@cache
def _bundled_tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(bundled_model_dir() / "tokenizer.json"))


# Filler is drawn freely until at most this many tokens are missing; then sentences are chosen that sum up exactly.
LANDING_TOKENS = 64


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
