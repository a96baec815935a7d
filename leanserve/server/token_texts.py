"""Single tokens as clients see them in log-probabilities: their bytes and their text. Knows no request."""

from leanserve.server.tokenizer import Tokenizer

__all__ = ["TokenTexts"]


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write bytes as characters: printable ones as themselves, the others from U+0100 on.

    Source: GPT-2, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class TokenTexts:
    """Bytes and text of single tokens; each is worked out once.

    Args:
        tokenizer: None where the model has none.
        as_ids: write each token as `token_id:5`; without a tokenizer there is no other way.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None
        self._bytes: dict[int, bytes] = {}
        self._special: set[int] = set()
        self._is_byte_level = False
        if tokenizer is not None:
            added = tokenizer.backend.get_added_tokens_decoder()
            self._added = {token_id: token.content.encode() for token_id, token in added.items()}
            self._special = {token_id for token_id, token in added.items() if token.special}
            self._is_byte_level = "ByteLevel" in str(tokenizer.backend.decoder)

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8, or a part of a character's; empty for an id without a token."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def text_of(self, token_id: int) -> str:
        """As OpenAI writes it: text, or `bytes:\\xe2\\x82` where the bytes are no text by themselves."""
        if self._as_ids:
            return f"token_id:{token_id}"
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def is_special(self, token_id: int) -> bool:
        """Such as `</s>`."""
        return token_id in self._special

    def _find_bytes(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return b""
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return bytes(_BYTE_OF_CHARACTER[c] for c in token if c in _BYTE_OF_CHARACTER)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()
