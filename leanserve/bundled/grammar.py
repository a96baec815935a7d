"""The grammar of the corpus: a ship's log, an inventory, a diary, and the facts they tell, sentence by sentence.

Most sentences are filler. Some state a `Fact` ("the brass key is in locker 4821"); a *distractor* resembles a fact and
differs in one word of its subject or in what it tells; an *update* overrules an earlier fact ("Correction: the brass
key is now in locker 7730."). A question names the subject in the fact's own words; its answer restates the fact.

Equal random numbers give equal text on every machine. This module knows no tokens and no lengths.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

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

__all__ = ["RELATIONS", "STYLES", "Fact", "Writer", "corpus_words"]

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
