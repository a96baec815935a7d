"""The bundled tokenizer: any text, one token per word of the corpus, the same file whenever it is trained."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from leanserve.bundled import bundled_model_dir, words
from leanserve.bundled.tokenizer import BEGIN, END, train_tokenizer, write_tokenizer

TOKENIZER = Tokenizer.from_file(str(bundled_model_dir() / "tokenizer.json"))


def tokens(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == BEGIN + text


@given(st.text(), st.text(min_size=1))
def test_tokens_of_pieces_that_start_at_a_newline_add_up(first: str, second: str) -> None:
    assert tokens(first + "\n" + second) == tokens(first) + tokens("\n" + second)


def test_every_word_that_facts_are_made_of_is_one_token() -> None:
    things = [*words.MATERIALS, *words.COLOURS, *words.OBJECTS, *words.GOODS, *words.CONTAINERS]
    for word in [*things, *words.PORTS, *words.FIRST_NAMES, *words.LAST_NAMES, *words.MONTHS]:
        assert tokens(f" {word}") == [f"Ġ{word}"]


def test_every_code_is_two_tokens() -> None:
    for code in range(10_000):
        assert tokens(f" {code:04d}") == [f"Ġ{code // 100:02d}", f"{code % 100:02d}"]


def test_training_again_gives_the_same_file(tmp_path: Path) -> None:
    write_tokenizer(train_tokenizer(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((bundled_model_dir() / name).read_text())


def test_the_chat_template_asks_like_the_corpus_does() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled_model_dir())
    chat = [
        {"role": "user", "content": "The brass key is in locker 4821.\nQuestion: Where is the brass key?"},
        {"role": "assistant", "content": "The brass key is in locker 4821."},
        {"role": "user", "content": "Question: Where is the brass key?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    turn = "\nQuestion: Where is the brass key?\nAnswer:"
    told = "The brass key is in locker 4821."
    assert text == f"{BEGIN}{told}{turn} {told}{END}{turn}"


@pytest.mark.parametrize("role", ["bos", "eos", "pad"])
def test_special_tokens_agree_with_the_model_config(role: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled_model_dir())
    config = json.loads((bundled_model_dir() / "config.json").read_text())
    assert getattr(tokenizer, f"{role}_token_id") == config[f"{role}_token_id"]
