"""The corpus: the same text for the same seed, facts that can be told apart, prompts of the exact length."""

import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from leanserve.bundled import bundled_model_dir
from leanserve.bundled.corpus import make_haystack, make_prompt
from leanserve.bundled.grammar import Fact, corpus_words

TOKENIZER = Tokenizer.from_file(str(bundled_model_dir() / "tokenizer.json"))
# Half of the longest sentence: a fact stands between two sentences.
NEAREST_SENTENCE_TOKENS = 16


@pytest.mark.parametrize("depth", [0, 0.35, 0.5, 1])
@pytest.mark.parametrize("tokens", [301, 1000, 4096])
@pytest.mark.parametrize("updated", [False, True], ids=["told once", "updated"])
def test_a_prompt_has_exactly_the_tokens_asked_for_and_the_fact_at_its_depth(
    tokens: int, depth: float, updated: bool
) -> None:
    prompt = make_prompt(tokens, depth, seed=11, distractors=2, updated=updated)
    ids = TOKENIZER.encode(prompt.text).ids
    assert len(ids) == tokens
    sentence = TOKENIZER.decode(ids[prompt.fact_token :]).split(".")[0]
    assert sentence.endswith(prompt.answer)
    ending = len(TOKENIZER.encode(f"\nQuestion: {prompt.question}\nAnswer:").ids)
    # Other facts and the header shift it by their own length at most.
    told = 5 * 2 * NEAREST_SENTENCE_TOKENS
    assert abs(prompt.fact_token - depth * (tokens - ending)) <= NEAREST_SENTENCE_TOKENS + told


def test_the_default_prompt_is_32k_tokens_with_the_fact_a_third_of_the_way_in() -> None:
    prompt = make_prompt()
    assert len(TOKENIZER.encode(prompt.text).ids) == 32_768
    assert abs(prompt.fact_token / 32_768 - 0.35) < 0.005
    assert prompt.text.endswith(f"Question: {prompt.question}\nAnswer:")


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_is_told_once_and_no_distractor_answers_the_question(seed: int) -> None:
    haystack = make_haystack(1500, (0.2, 0.8), f"test/{seed}", distractors=8)
    sentences = haystack.text.replace("\n", " ").split(".")
    for fact in haystack.facts:
        telling = [s for s in sentences if f"{fact.clause} ".lower() in f"{s} ".lower()]
        assert len(telling) == 1
        assert telling[0].endswith(f" {fact.value}")


def test_an_update_follows_the_fact_it_overrules_and_both_are_told() -> None:
    haystack = make_haystack(1500, (0.3, 0.9), "updates", updated=True)
    for fact in haystack.facts:
        assert fact.overrules
        old = Fact(fact.relation, fact.a, fact.b, "")
        first = haystack.text.lower().index(f"{old.clause} ".lower())
        assert first < haystack.text.index(f"Correction: {fact.clause} {fact.value}.")


def test_at_depth_0_too_an_update_comes_second() -> None:
    prompt = make_prompt(600, 0, seed=2, updated=True, distractors=0)
    correction = prompt.text.index("Correction: ")
    subject = prompt.text[correction:].split(":")[1].split(" now ")[0].split(" really ")[0].split(" is ")[0].strip()
    assert 0 < prompt.text.lower().index(subject.lower()) < correction


def test_every_word_written_is_a_word_of_the_corpus() -> None:
    for seed in range(10):
        text = make_haystack(1500, (0.1, 0.5), f"words/{seed}", distractors=5, updated=True).text
        assert set(re.findall(r"[a-z]+", text.lower())) <= corpus_words()


def test_equal_seeds_give_equal_text_whatever_the_hash_seed() -> None:
    script = "from leanserve.bundled.corpus import make_prompt; print(make_prompt(600, seed=5).text)"
    texts = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.removesuffix("\n")
        for seed in (1, 2)
    }
    assert texts == {make_prompt(600, seed=5).text}
    assert make_prompt(600, seed=6).text not in texts


def test_the_corpus_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from leanserve.bundled.corpus import make_prompt; make_prompt(600);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 40}, r"tokens is 40; .* need at least \d+"),
        ({"depth": 1.5}, "depth is 1.5; it must be between 0"),
        ({"depth": -0.1}, "depth is -0.1"),
        ({"distractors": 5000}, "no subject is left for another such fact"),
        ({"distractors": -1}, "distractors is -1; it must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_prompt(**arguments)  # pyright: ignore[reportArgumentType]


def test_the_least_length_that_the_error_names_is_enough() -> None:
    with pytest.raises(ValueError, match="need at least") as refused:
        make_prompt(40)
    least = int(str(refused.value).rsplit(" ", 1)[1])
    assert len(TOKENIZER.encode(make_prompt(least).text).ids) == least
