"""How the tokens that a step has left beside its decode rows are dealt to prompts. Knows counts; no pages, no queue."""

from leanserve.engine.sequence import Sequence

__all__ = ["PromptShares"]


class PromptShares:
    """One step's shares of the sequences whose prompts are not computed yet.

    Short prompts go first, in order of age; long ones share evenly what those leave. Where both want more than there
    is, the long ones together are sure of half, and each of one token. So a short prompt does not stand behind a long
    one, and no stream of short ones holds a long one up.
    """

    def __init__(self, tokens: int) -> None:
        """`tokens` is at least the number of sequences that run and do not decode."""
        self._tokens = tokens
        self._short: list[tuple[Sequence, int]] = []
        self._long: list[tuple[Sequence, int]] = []
        self._short_tokens = 0
        self._long_tokens = 0

    def add(self, sequence: Sequence, wanted_tokens: int) -> None:
        """A sequence wants up to `wanted_tokens` (>= 1) in this step. Call in order of age."""
        if sequence.is_long:
            self._long.append((sequence, wanted_tokens))
            self._long_tokens += wanted_tokens
        else:
            self._short.append((sequence, wanted_tokens))
            self._short_tokens += wanted_tokens

    def has_room_for(self, wanted_tokens: int, *, is_long: bool) -> bool:
        """Whether one more sequence would get a token, and everybody else still would."""
        if not is_long:
            return self._short_tokens < self._tokens_for_short(self._long_tokens, len(self._long))
        short_tokens = self._tokens_for_short(self._long_tokens + wanted_tokens, len(self._long) + 1)
        before_last_short = self._short_tokens - (self._short[-1][1] if self._short else 0)
        return short_tokens >= 0 and (not self._short or before_last_short < short_tokens)

    def deal(self) -> list[tuple[Sequence, int]]:
        """Tokens of each sequence that gets any: the short ones, then the long ones."""
        shares: list[tuple[Sequence, int]] = []
        left = min(self._short_tokens, self._tokens_for_short(self._long_tokens, len(self._long)))
        left_for_long = self._tokens - left
        for sequence, wanted_tokens in self._short:
            share = min(wanted_tokens, left)
            if share == 0:
                break
            shares.append((sequence, share))
            left -= share
        # Who wants least is dealt first, so that what is over falls to the others.
        by_want = sorted(self._long, key=lambda wish: wish[1])
        for num_left, (sequence, wanted_tokens) in zip(range(len(by_want), 0, -1), by_want, strict=True):
            share = min(wanted_tokens, left_for_long // num_left)
            shares.append((sequence, share))
            left_for_long -= share
        return shares

    def _tokens_for_short(self, long_tokens: int, num_long: int) -> int:
        """What short prompts may take at most. Negative when there are more long ones than tokens."""
        return self._tokens - min(long_tokens, max(self._tokens // 2, num_long))
