"""How many tokens a step may hold. Knows counts and seconds; no sequences."""

from leanserve.contracts.config import BatchOptions

__all__ = ["PREFILL_STEP_S", "StepBudget"]

PREFILL_STEP_S = 1.0
"""What a step of prompts alone should not take longer than."""


class StepBudget:
    """Streams wait for every step, so one that holds decode rows holds no more than `max_batch_tokens`.

    A step of prompts alone may hold more, which computes them faster. Yet whoever comes while it runs waits for it, and
    so does an abort. So it grows only as far as this machine computes it in a second: it begins with
    `max_batch_tokens`, doubles after a full step that took half of a second or less, up to `max_prefill_step_tokens`,
    and halves after one that took more than a second, down to `max_batch_tokens`. A step takes longer the more comes
    before its tokens, and that may change from one prompt to the next: so one step now and then is too long, by no more
    than the ratio of the two options. A machine that is slow with a model stays at `max_batch_tokens`.
    """

    def __init__(self, options: BatchOptions) -> None:
        self._with_decode_tokens = options.max_batch_tokens
        self._longest_tokens = options.longest_step_tokens
        self._without_decode_tokens = options.max_batch_tokens

    def tokens(self, num_decode_rows: int) -> int:
        """What the next step may hold, those rows included."""
        return self._with_decode_tokens if num_decode_rows else self._without_decode_tokens

    def note(self, tokens: int, took_s: float) -> None:
        """A step of so many tokens, with decode rows or without, took so long."""
        if took_s > PREFILL_STEP_S:
            self._without_decode_tokens = max(self._without_decode_tokens // 2, self._with_decode_tokens)
        elif tokens >= self._without_decode_tokens and took_s <= PREFILL_STEP_S / 2:
            self._without_decode_tokens = min(self._without_decode_tokens * 2, self._longest_tokens)
