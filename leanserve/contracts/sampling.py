"""How the next token is chosen and when a completion ends: one request's wishes, checked once."""

import math

import msgspec

from leanserve.contracts.errors import RequestError

__all__ = [
    "MAX_CACHE_SALT_CHARS",
    "MAX_PRIORITY",
    "MAX_STOP_STRINGS",
    "MAX_STOP_TOKEN_IDS",
    "FinishReason",
    "SamplingParams",
]

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
MAX_CACHE_SALT_CHARS = 256
MAX_PRIORITY = 1_000_000

FinishReason = str
"""`"stop"` (an end token, a stop string or a stop id), `"length"` (max_tokens), `"abort"` or `"error"`."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Sampling options of one request, under the names vLLM and OpenAI users know.

    Raises:
        RequestError: a value outside its range; the message names the field, the value and the range.
    """

    max_tokens: int = 16
    """Tokens to generate at most, >= 1."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it. 0 to 2."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches top_p. In (0, 1]."""
    top_k: int | None = None
    """Keep the k most likely tokens; None keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one. 0 to 1."""
    seed: int | None = None
    """Any int64. The same seed gives the same tokens whatever else runs; None draws a seed at admission."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; the text ends before them. Found by whoever owns text, not by the engine."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-sequence tokens."""
    priority: int = 0
    """Lower is more urgent: each step is worth 10 s of waiting, so that whoever waits long enough comes first in the
    end. From -1,000,000 to 1,000,000."""
    cache_salt: str | None = None
    """Requests share cached pages only with those of the same salt, so that one tenant cannot find out by timing what
    another has sent. Any text of 1 to 256 characters; None is shared by all who give none."""

    def __post_init__(self) -> None:
        def refuse(field: str, allowed: str) -> RequestError:
            return RequestError(f"{field} is {getattr(self, field)!r}; {allowed}", param=field, code="invalid_value")

        if isinstance(self.stop, str):  # the vLLM spelling SamplingParams(stop="\n")
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for field in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, field), list):
                msgspec.structs.force_setattr(self, field, tuple(getattr(self, field)))
        if self.top_k in (0, -1):  # both are common spellings of "all"
            msgspec.structs.force_setattr(self, "top_k", None)

        def is_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_text(value: object, max_chars: int | None = None) -> bool:
            return isinstance(value, str) and len(value) >= 1 and (max_chars is None or len(value) <= max_chars)

        def is_finite(value: object) -> bool:
            try:
                return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            except OverflowError:  # an int beyond any float
                return False

        if not is_int(self.max_tokens) or self.max_tokens < 1:
            raise refuse("max_tokens", "it must be an integer of at least 1")
        if not is_finite(self.temperature) or not 0 <= self.temperature <= 2:
            raise refuse("temperature", "it must be from 0 (greedy) to 2")
        if not is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise refuse("top_p", "it must be above 0 and at most 1 (1 keeps all tokens)")
        if self.top_k is not None and (not is_int(self.top_k) or self.top_k < 1):
            raise refuse("top_k", "it must be at least 1; leave it out, or give 0 or -1, to keep all tokens")
        if not is_finite(self.min_p) or not 0 <= self.min_p <= 1:
            raise refuse("min_p", "it must be from 0 to 1")
        if self.seed is not None and (not is_int(self.seed) or not -(2**63) <= self.seed < 2**63):
            raise refuse("seed", "it must be an integer that fits in 64 bits")
        if len(self.stop) > MAX_STOP_STRINGS or not all(is_text(s) for s in self.stop):
            raise refuse("stop", f"it must be at most {MAX_STOP_STRINGS} non-empty strings")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS or any(not is_int(t) or t < 0 for t in self.stop_token_ids):
            raise refuse("stop_token_ids", f"it must be at most {MAX_STOP_TOKEN_IDS} token ids, none negative")
        if not is_int(self.priority) or abs(self.priority) > MAX_PRIORITY:
            raise refuse("priority", f"it must be an integer from {-MAX_PRIORITY} (most urgent) to {MAX_PRIORITY}")
        if self.cache_salt is not None and not is_text(self.cache_salt, MAX_CACHE_SALT_CHARS):
            raise refuse("cache_salt", f"it must be a string of 1 to {MAX_CACHE_SALT_CHARS} characters")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0
