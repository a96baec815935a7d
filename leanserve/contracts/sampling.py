"""How the next token is chosen and when a completion ends: one request's wishes, checked once."""

import math
from collections.abc import Iterable
from typing import Any, cast

import msgspec

from leanserve.contracts.errors import RequestError
from leanserve.contracts.structured_outputs import StructuredOutputsParams

__all__ = [
    "MAX_ALLOWED_TOKEN_IDS",
    "MAX_CACHE_SALT_CHARS",
    "MAX_LOGIT_BIASES",
    "MAX_LOGPROBS",
    "MAX_PRIORITY",
    "MAX_SAMPLES",
    "MAX_STOP_STRINGS",
    "MAX_STOP_TOKEN_IDS",
    "FinishReason",
    "SamplingParams",
]

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
MAX_CACHE_SALT_CHARS = 256
MAX_PRIORITY = 1_000_000
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_LOGIT_BIASES = 1024
MAX_ALLOWED_TOKEN_IDS = 4096

_INT32_MAX = 2**31 - 1
"""Of token ids and counts of them: no message and no tensor holds more."""

FinishReason = str
"""`"stop"` (an end token, a stop string or a stop id), `"length"` (max_tokens), `"abort"` or `"error"`."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Sampling options of one request, under the names vLLM and OpenAI users know.

    A token's logits are changed in this order: logit_bias, repetition_penalty, frequency_penalty, presence_penalty,
    temperature; then tokens are ruled out by allowed_token_ids, min_tokens and structured_outputs; then by top_k, top_p
    and min_p. Where all of them would leave nothing, structured_outputs has the last word.

    Raises:
        RequestError: a value outside its range; the message names the field, the value and the range.
    """

    n: int = 1
    """Completions of the prompt, 1 to 128: `samples` says what each of them is."""
    max_tokens: int = 16
    """Tokens to generate at most, >= 1."""
    min_tokens: int = 0
    """Generate no end token, and find no stop string, before so many tokens. 0 to max_tokens."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it. 0 to 2."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches top_p. In (0, 1]."""
    top_k: int | None = None
    """Keep the k most likely tokens; None keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one. 0 to 1."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that was generated before. -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was generated before. -2 to 2."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or generated before are divided by it, negative ones multiplied. 0.01 to 100."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids: at most 1024, each from -100 to 100."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Generate only these, at most 4096 of them."""
    logprobs: int | None = None
    """For each generated token: its log-probability and those of the so many most likely ones, 0 to 20. They are the
    model's own, in float32, before anything above. None gives none."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the text must look like. A dict with its fields does as well."""
    truncate_prompt_tokens: int | None = None
    """Keep only so many of the prompt's last tokens, >= 1. Applied by whoever makes the token ids."""
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
        self._normalize()

        def require(field: str, is_right: bool, allowed: str) -> None:
            if not is_right:
                shown = repr(getattr(self, field))
                shown = shown if len(shown) <= 100 else shown[:100] + "..."
                raise RequestError(f"{field} is {shown}; {allowed}", param=field, code="invalid_value")

        def require_number(field: str, low: float, high: float, allowed: str) -> None:
            require(field, _is_finite(getattr(self, field)) and low <= getattr(self, field) <= high, allowed)

        def require_int(field: str, low: float, high: float, allowed: str) -> None:
            require(field, _is_int(getattr(self, field)) and low <= getattr(self, field) <= high, allowed)

        require_int("n", 1, MAX_SAMPLES, f"it must be an integer from 1 to {MAX_SAMPLES}")
        require_int("max_tokens", 1, math.inf, "it must be an integer of at least 1")
        require_int(
            "min_tokens", 0, self.max_tokens, f"it must be an integer from 0 to max_tokens, which is {self.max_tokens}"
        )
        require_number("temperature", 0, 2, "it must be from 0 (greedy) to 2")
        require_number("top_p", 0, 1, "it must be above 0 and at most 1 (1 keeps all tokens)")
        require("top_p", self.top_p > 0, "it must be above 0 and at most 1 (1 keeps all tokens)")
        if self.top_k is not None:
            require_int(
                "top_k",
                1,
                _INT32_MAX,
                f"it must be from 1 to {_INT32_MAX}; leave it out, or give 0 or -1, to keep all tokens",
            )
        require_number("min_p", 0, 1, "it must be from 0 to 1")
        for field in ("presence_penalty", "frequency_penalty"):
            require_number(field, -2, 2, "it must be from -2 to 2 (0 is none)")
        require_number("repetition_penalty", 0.01, 100, "it must be from 0.01 to 100 (1 is none)")
        require(
            "logit_bias",
            self.logit_bias is None
            or (
                isinstance(self.logit_bias, dict)  # pyright: ignore[reportUnnecessaryIsInstance]
                and len(self.logit_bias) <= MAX_LOGIT_BIASES
                and all(_is_token_id(token_id) for token_id in self.logit_bias)
                and all(_is_finite(bias) and -100 <= bias <= 100 for bias in self.logit_bias.values())
            ),
            f"it must map at most {MAX_LOGIT_BIASES} token ids to numbers from -100 to 100",
        )
        require(
            "allowed_token_ids",
            self.allowed_token_ids is None
            or (
                0 < len(self.allowed_token_ids) <= MAX_ALLOWED_TOKEN_IDS
                and all(map(_is_token_id, self.allowed_token_ids))
            ),
            f"it must be 1 to {MAX_ALLOWED_TOKEN_IDS} token ids, each from 0 to {_INT32_MAX}",
        )
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                require_int(field, 0, MAX_LOGPROBS, f"it must be an integer from 0 to {MAX_LOGPROBS}")
        require(
            "structured_outputs",
            self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputsParams),  # pyright: ignore[reportUnnecessaryIsInstance]
            "it must be a StructuredOutputsParams, or a dict with its fields",
        )
        if self.truncate_prompt_tokens is not None:
            require_int("truncate_prompt_tokens", 1, _INT32_MAX, f"it must be an integer from 1 to {_INT32_MAX}")
        if self.seed is not None:
            require_int("seed", -(2**63), 2**63 - 1, "it must be an integer that fits in 64 bits")
        require(
            "stop",
            len(self.stop) <= MAX_STOP_STRINGS and all(_is_text(text) for text in self.stop),
            f"it must be at most {MAX_STOP_STRINGS} non-empty strings",
        )
        require(
            "stop_token_ids",
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS and all(map(_is_token_id, self.stop_token_ids)),
            f"it must be at most {MAX_STOP_TOKEN_IDS} token ids, each from 0 to {_INT32_MAX}",
        )
        require_int(
            "priority",
            -MAX_PRIORITY,
            MAX_PRIORITY,
            f"it must be an integer from {-MAX_PRIORITY} (most urgent) to {MAX_PRIORITY}",
        )
        require(
            "cache_salt",
            self.cache_salt is None or _is_text(self.cache_salt, MAX_CACHE_SALT_CHARS),
            f"it must be a string of 1 to {MAX_CACHE_SALT_CHARS} characters",
        )

    def _normalize(self) -> None:
        """Accept other common spellings."""

        def put(field: str, value: object) -> None:
            msgspec.structs.force_setattr(self, field, value)

        if isinstance(self.stop, str):  # the vLLM spelling SamplingParams(stop="\n")
            put("stop", (self.stop,))
        for field in ("stop", "stop_token_ids", "allowed_token_ids"):
            if isinstance(getattr(self, field), list):
                put(field, tuple(getattr(self, field)))
        if self.top_k in (0, -1):  # both mean "all"
            put("top_k", None)
        wish: Any = self.structured_outputs
        if isinstance(wish, dict):
            try:
                put("structured_outputs", StructuredOutputsParams(**cast("dict[str, Any]", wish)))
            except TypeError as error:
                raise RequestError(
                    f"structured_outputs: {error}", param="structured_outputs", code="invalid_value"
                ) from None

    def samples(self) -> list["SamplingParams"]:
        """What each of the n completions is: a request of its own. That of index i has the seed `seed + i`, as in vLLM
        (beyond the largest int64, on from the smallest)."""
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else (self.seed + i + 2**63) % 2**64 - 2**63 for i in range(self.n)]
        return [msgspec.structs.replace(self, n=1, seed=seed) for seed in seeds]

    def end_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end the completion, for a model whose own are `eos_token_ids`."""
        return frozenset(self.stop_token_ids if self.ignore_eos else (*self.stop_token_ids, *eos_token_ids))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _INT32_MAX


def _is_text(value: object, max_chars: int | None = None) -> bool:
    return isinstance(value, str) and len(value) >= 1 and (max_chars is None or len(value) <= max_chars)


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond any float
        return False
