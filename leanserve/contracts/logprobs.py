"""Log-probabilities of a run of tokens, packed for travel."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

__all__ = ["Logprobs", "TokenLogprobs"]


class TokenLogprobs(NamedTuple):
    """One token's log-probability, its rank (1 is the most likely), and the most likely tokens with theirs."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities of some tokens in a row, column by column, in native byte order.

    They are the model's own: the log-softmax of its logits in float32, before temperature, penalties or masks.
    """

    num_top: int
    """Most likely tokens told for each token, k."""
    chosen: bytes
    """float32 [tokens]: of the token itself."""
    ranks: bytes
    """int32 [tokens]: how many tokens are more likely than it, plus one."""
    top_token_ids: bytes
    """int32 [tokens, k], the most likely first, ties by id."""
    top: bytes
    """float32 [tokens, k]."""

    def __len__(self) -> int:
        return len(self.chosen) // 4

    def row(self, index: int) -> "Logprobs":
        """Those of one token."""
        one, k = slice(4 * index, 4 * index + 4), 4 * self.num_top
        several = slice(k * index, k * index + k)
        return Logprobs(self.num_top, self.chosen[one], self.ranks[one], self.top_token_ids[several], self.top[several])

    @classmethod
    def join(cls, parts: "Sequence[Logprobs]") -> "Logprobs":
        """Those of all parts' tokens, in order; each part has the same `num_top`."""
        return cls(
            parts[0].num_top,
            b"".join([part.chosen for part in parts]),
            b"".join([part.ranks for part in parts]),
            b"".join([part.top_token_ids for part in parts]),
            b"".join([part.top for part in parts]),
        )

    def rows(self) -> "list[TokenLogprobs]":
        """The same, token by token."""
        chosen, top = array("f", self.chosen), array("f", self.top)
        ranks, top_token_ids = array("i", self.ranks), array("i", self.top_token_ids)
        k = self.num_top
        return [
            TokenLogprobs(
                chosen[i], ranks[i], list(zip(top_token_ids[i * k : i * k + k], top[i * k : i * k + k], strict=True))
            )
            for i in range(len(chosen))
        ]
