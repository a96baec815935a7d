"""Tokenizers of the two families that matter, small enough to make in a test: no files from elsewhere."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SAMPLES = [
    "The cat sat on the mat. The dog ate the cat's hat!",
    "naïve café über 北京 你好世界 😀👩‍👩‍👧 x = 3.14159\n\n\tdef f(x): return x",
    "STOP stopping stopped; END of the end.",
]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's, Qwen's, Llama 3's kind: bytes as characters, so that characters may span tokens. 512 tokens at most."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES * 20, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama 2's, Mistral's kind: words with a leading mark, and bytes for what the vocabulary lacks."""
    words = ["▁", "▁The", "▁the", "▁cat", "▁s", "at", "▁mat", ".", "!", "STOP", "ping", "c", "a", "t", "s"]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    }
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, directory: Path, config: dict[str, object]) -> Path:
    """A checkpoint directory's tokenizer files."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
