"""The sharded KV cache as numbers: how many pages each rank has, and where a granted page lies."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

__all__ = ["KvSharding", "PageCopy", "PageGrant", "page_imbalance"]


@dataclass(frozen=True)
class KvSharding:
    """Sizes of the page pools. Pools may be uneven."""

    page_tokens: int
    """Tokens per page."""
    pages_per_rank: tuple[int, ...]
    """Pages in each rank's pool, by rank."""

    @property
    def num_ranks(self) -> int:
        return len(self.pages_per_rank)

    @property
    def total_tokens(self) -> int:
        """Tokens that all pools hold together: the longest sequence that can ever fit."""
        return sum(self.pages_per_rank) * self.page_tokens

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence take, over all ranks."""
        return -(-tokens // self.page_tokens)


class PageGrant(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Page `ordinal` of a sequence (its tokens from ordinal * page_tokens on) lies in page `page` of rank `rank`."""

    sequence_id: int
    ordinal: int
    rank: int
    page: int


class PageCopy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Rank `rank` copies its page `source` to its page `target`: somebody begins alike and writes on there."""

    rank: int
    source: int
    target: int


def page_imbalance(used_per_rank: Sequence[int]) -> float:
    """Pages of the rank that reads most over the mean of all ranks: 1 is even, and N all on one of N ranks."""
    return max(used_per_rank) * len(used_per_rank) / sum(used_per_rank) if any(used_per_rank) else 1.0
