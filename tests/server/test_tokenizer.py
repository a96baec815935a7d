"""The same ids and the same text as transformers' PreTrainedTokenizerFast on the same files."""

import json
import warnings
from pathlib import Path

import pytest
import tokenizers

from leanserve.contracts.errors import CheckpointError
from leanserve.server.tokenizer import Tokenizer
from server.small_tokenizers import SAMPLES, byte_fallback, byte_level, save

CONFIGS: dict[str, dict[str, object]] = {
    "plain": {"bos_token": "<s>", "eos_token": "</s>"},
    "adds bos": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    "adds both": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
    "adds none": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
    "a bos outside the vocabulary": {"bos_token": "<new>", "add_bos_token": True},
    "tokens as objects": {
        "bos_token": {
            "__type": "AddedToken",
            "content": "<s>",
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        },
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "add_bos_token": True,
    },
    "new special tokens": {
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "additional_special_tokens": ["<|user|>", "<|bot|>"],
        "image_token": "<image>",
    },
    "named extra tokens": {"extra_special_tokens": {"audio_token": "<audio>"}, "eos_token": "</s>"},
    "added tokens": {
        "added_tokens_decoder": {
            "900": {"content": "<think>", "special": False, "normalized": False},
            "901": {"content": "<|sep|>", "special": True, "normalized": False, "rstrip": True},
        },
        "eos_token": "</s>",
    },
    "splits special tokens": {"bos_token": "<s>", "eos_token": "</s>", "split_special_tokens": True},
}

TEXTS = [
    *SAMPLES,
    "",
    " ",
    "  two  spaces ",
    "<s>x</s>",
    "a<|end|>b <|user|> <|bot|>c",
    "<think> y <|sep|>  z<image><audio>",
]


@pytest.fixture(params=[byte_level, byte_fallback], ids=["byte_level", "byte_fallback"])
def backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return request.param()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_ids_and_text_equal_those_of_transformers(
    backend: tokenizers.Tokenizer, config: dict[str, object], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own imports
        from transformers import PreTrainedTokenizerFast

    directory = save(backend, tmp_path, config)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    ours = Tokenizer.from_dir(directory)
    assert ours is not None
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == expected, (text, special)
            for skip in (True, False):
                assert ours.decode(expected, skip_special_tokens=skip) == theirs.decode(
                    expected, skip_special_tokens=skip
                )
    assert ours.vocab_size == len(theirs)


def test_special_tokens_map_of_old_checkpoints(backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = save(backend, tmp_path, {"add_bos_token": True})
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|end|>"}))
    ours, theirs = Tokenizer.from_dir(directory), PreTrainedTokenizerFast.from_pretrained(str(directory))
    assert ours is not None
    assert ours.encode("The cat<|end|>") == theirs("The cat<|end|>")["input_ids"]


def test_truncation_saved_with_the_file_does_not_cut_prompts(backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    whole = Tokenizer(backend).encode(SAMPLES[0])
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    ours = Tokenizer.from_dir(save(backend, tmp_path, {}))
    assert ours is not None
    assert ours.encode(SAMPLES[0], add_special_tokens=False) == [i for i in whole if i != 1]


def test_a_batch_equals_single_texts(backend: tokenizers.Tokenizer) -> None:
    ours = Tokenizer(backend)
    assert ours.encode_batch(SAMPLES) == [ours.encode(text) for text in SAMPLES]


def test_no_token_is_longer_than_the_gate_believes(backend: tokenizers.Tokenizer) -> None:
    ours = Tokenizer(backend)
    for text in SAMPLES:
        assert len(ours.encode(text, add_special_tokens=False)) >= len(text) / ours.max_token_chars


def test_a_checkpoint_without_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.from_dir(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, file: str, content: str) -> None:
    save(byte_level(), tmp_path, {})
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        Tokenizer.from_dir(tmp_path)
