"""The grammar: distractors and updates differ from their fact in what they should, and filler keeps off the facts."""

import random

import pytest

from leanserve.bundled.grammar import RELATIONS, STYLES, Writer


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_distractor_differs_from_its_fact_in_one_thing_and_an_update_in_the_value_only(relation: str) -> None:
    writer = Writer(random.Random(3), "log")
    fact = next(fact for fact in iter(writer.fact, None) if fact.relation == relation)
    update = writer.update(fact)
    assert update.key == fact.key
    assert update.value != fact.value
    for _ in range(20):
        distractor = writer.distractor(fact)
        assert distractor.key != fact.key
        differing = [ours != theirs for ours, theirs in zip(distractor.key, fact.key, strict=True)]
        assert sum(differing) == 1


@pytest.mark.parametrize("style", STYLES)
def test_filler_never_speaks_of_what_facts_speak_of(style: str) -> None:
    writer = Writer(random.Random(4), style)
    told = {word for relation in RELATIONS.values() if relation.heads[0] == "brass" for word in relation.tails}
    words = {word.strip(".,").lower() for _ in range(3000) for word in writer.filler().split()}
    assert len(words) > 150
    assert not words & told


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="style is 'novel'; allowed are log, inventory, diary"):
        Writer(random.Random(1), "novel")
