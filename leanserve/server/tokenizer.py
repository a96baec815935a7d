"""Text to token ids and back, through the `tokenizers` library alone: transformers' tokenizer classes import torch."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import tokenizers

from leanserve.contracts.errors import CheckpointError
from leanserve.server.tokenizer_files import read_tokenizer_file

__all__ = ["Tokenizer"]

_TEXTS_KEPT = 1 << 16
_NAMED_SPECIAL_TOKENS = re.compile(r"[a-z0-9_]+_token")


class Tokenizer:
    """A checkpoint's tokenizer, with the ids that transformers' PreTrainedTokenizerFast gives for the same files."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.directory: Path | None = None
        """Where it was read from."""
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max((len(token) for token in backend.get_vocab(with_added_tokens=True)), default=1)
        """Characters of the longest token: a text has at least len(text) / max_token_chars tokens."""
        self._added = backend.get_added_tokens_decoder()
        special = [re.escape(token.content) for token in self._added.values() if token.special and token.content]
        self._special = re.compile("|".join(special)) if special else None
        self._is_byte_level = "ByteLevel" in repr(backend.decoder)

        def text_of(token_id: int, skip_special_tokens: bool) -> str:
            return backend.decode([token_id], skip_special_tokens=skip_special_tokens)

        self._text_of = lru_cache(maxsize=_TEXTS_KEPT)(text_of)

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> "Tokenizer | None":
        """Read tokenizer.json and tokenizer_config.json; None when the checkpoint has no tokenizer.json.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        directory = Path(model_dir)
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error
        config = read_tokenizer_file(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= read_tokenizer_file(directory / "special_tokens_map.json")
        _apply_config(backend, config)
        tokenizer = cls(backend)
        tokenizer.directory = directory
        return tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Long texts belong in a thread; this entry of the library gives up the GIL meanwhile."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids without a token are skipped."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_one(self, token_id: int, *, skip_special_tokens: bool = True) -> str:
        """`decode` of one token, remembered: streams ask for the same ones again and again."""
        return self._text_of(token_id, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, as bytes: it may be a part of a character. Empty for an id without a token."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if self._is_byte_level:
            return (
                bytes(_BYTE_OF[char] for char in token) if all(char in _BYTE_OF for char in token) else token.encode()
            )
        if _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def without_special_tokens(self, text: str) -> str:
        """A text that was decoded with its special tokens, without them."""
        return self._special.sub("", text) if self._special is not None else text


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as (GPT-2): printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _apply_config(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Bring the backend to what transformers makes of tokenizer_config.json.

    `add_bos_token` and `add_eos_token` say nothing beside a tokenizer.json: its own template decides.
    """
    backend.no_truncation()  # a training-time setting saved with the file; never cut a prompt silently
    backend.no_padding()
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = cast("dict[str, Any]", config.get("added_tokens_decoder") or {})
    added: list[tokenizers.AddedToken] = []
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        token = _added_token(entry)
        if token is not None and token.content not in known:
            added.append(token)
    backend.add_tokens(added)  # pyright: ignore[reportUnknownMemberType]
    special = [_added_token(value) for key, value in config.items() if _NAMED_SPECIAL_TOKENS.fullmatch(key)]
    extra: Any = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    is_named = isinstance(extra, dict)
    special += [_added_token(value) for value in cast("list[Any]", [*(extra.values() if is_named else extra)])]
    named = [token for token in special if token is not None]
    backend.add_special_tokens(named)  # pyright: ignore[reportUnknownMemberType]
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))


def _added_token(value: object) -> tokenizers.AddedToken | None:
    """A token as tokenizer_config.json writes it: a string, or an object with its flags."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict):
        entry = cast("dict[str, Any]", value)
        if isinstance(entry.get("content"), str):
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            return tokenizers.AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
    return None
