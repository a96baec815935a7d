"""The checkpoint that ships: loads in transformers, answers, writes English, and is what its card says it is."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, SmolLM3ForCausalLM

from closeness import assert_close
from leanserve.bundled import bundled_model_dir
from leanserve.bundled.corpus import make_prompt
from leanserve.bundled.evaluate import broken_words, sample
from leanserve.bundled.held_out import KINDS
from leanserve.bundled.network import load

MODEL = bundled_model_dir()
EVALUATION = json.loads((MODEL / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def theirs() -> SmolLM3ForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert isinstance(model, SmolLM3ForCausalLM)
    return model


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 8_000_000


def test_ours_and_transformers_give_the_same_logits(
    theirs: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = torch.tensor([tokenizer(make_prompt(700, seed=1).text).input_ids])
    with torch.inference_mode():
        network = load(MODEL)
        hidden, _ = network(ids, torch.arange(ids.shape[1])[None])
        expected = theirs(ids).logits
        scale = expected.abs().max().item()
        assert_close(network.logits(hidden) / scale, expected / scale, torch.float32)


def test_it_answers_short_needles_as_often_as_the_card_says(
    theirs: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [make_prompt(512, (i % 10) / 9, seed=1000 + i, distractors=0) for i in range(40)]
    ids = tokenizer([prompt.text for prompt in prompts], return_tensors="pt")
    assert ids["input_ids"].shape == (40, 512)
    with torch.inference_mode():
        output = theirs.generate(**ids, max_new_tokens=24, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    completions = tokenizer.batch_decode(output[:, 512:], skip_special_tokens=True)
    right = sum(prompt.answer in text for prompt, text in zip(prompts, completions, strict=True)) / len(prompts)
    card = EVALUATION["accuracy"]["plain"]["512"]
    assert right >= card - 3 * math.sqrt(max(card * (1 - card), 0.01) / len(prompts))


def test_free_completions_are_the_words_of_the_corpus(tokenizer: PreTrainedTokenizerFast) -> None:
    network = load(MODEL)
    backend = tokenizer.backend_tokenizer
    texts = sample(network, backend, samples=10, tokens=64, temperature=0.7)
    for text in texts:
        assert len(text.split()) > 20
        assert not broken_words(text), text


def test_broken_words_are_noticed() -> None:
    assert broken_words("The brass kew is in loc ker 4821.") == {"kew", "loc", "ker"}


def test_the_card_quotes_the_measurement() -> None:
    card = (MODEL / "README.md").read_text()
    accuracy = EVALUATION["accuracy"]
    assert list(accuracy) == list(KINDS)
    rows: list[str] = []
    for tokens in accuracy["plain"]:
        shares = [table.get(tokens) for table in accuracy.values()]
        cells = [f"{int(tokens):,}", *("" if share is None else f"{100 * share:.1f}%" for share in shares)]
        rows.append(f"| {' | '.join(cells)} |")
    for tokens, figures in EVALUATION["http"].items():
        assert figures["ranks"] == [1, 3]
        assert figures["different_between_ranks"] == 0
        rows.append(f"| {int(tokens):,} | {figures['right']} of {figures['answers']} |")
    assert re.findall(r"^\| [\d,]+ \|.*", card, flags=re.MULTILINE) == rows
    assert f"perplexity is {EVALUATION['perplexity']:.2f}" in card
