"""Trains the bundled tokenizer: a byte-level BPE whose tokens are the corpus's words, and any other text's bytes.

Text splits at every space and newline, and numbers split into pairs of digits ("4821" is "48" and "21"), so that a
document's tokens are the tokens of its pieces, one after the other.

    python -m leanserve.bundled.tokenizer
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from leanserve.bundled import bundled_model_dir
from leanserve.bundled.grammar import STYLES, Writer

__all__ = ["BEGIN", "END", "PAD", "train_tokenizer", "write_tokenizer"]

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
"""Token 0 stands before every document, token 1 ends every answer, token 2 fills batches."""

VOCABULARY = 3072
SPLIT = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\nAnswer: ' + message['content'] + eos_token }}"
    "{% elif not loop.first %}{{ '\n' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAnswer:' }}{% endif %}"
)


def _lines(documents: int) -> Iterator[str]:
    rng = random.Random("tokenizer")
    for _ in range(documents):
        writer = Writer(rng, rng.choice(STYLES))
        yield writer.header()
        for _ in range(30):
            fact = writer.fact()
            for told in (fact, writer.update(fact)):
                yield f"{writer.opener()} {writer.filler()} {writer.state(told)}"
            yield f"Question: {fact.question}"
            yield f"Answer: {fact.answer_clause} {fact.value}."
    # Every pair of digits, at a number's start and inside it.
    for pair in range(100):
        yield from [f" {pair:02d}{pair:02d}"] * 20


def train_tokenizer(documents: int = 1500) -> Tokenizer:
    """A tokenizer trained on `documents` documents of the corpus. The same on every machine."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(SPLIT), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(documents), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `transformers` reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 65536,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    bundled_model_dir().mkdir(exist_ok=True)
    write_tokenizer(train_tokenizer(), bundled_model_dir())
