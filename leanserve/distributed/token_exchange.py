"""What ranks that hold parts of the weights say to each other within a layer. Knows tensors, not what they mean.

A step's M tokens lie on the ranks by `TokenSpread`: every rank has the shared ones (the decode rows), and each has its
own (prefill). A rank that holds J_r of a matrix's J columns must compute them for all M tokens, whereas everything
else is computed by token. So tensors change between two layouts, and results change back:

    by token     this rank's N tokens, all columns
    by columns   all M tokens, this rank's columns

No all-reduce: what NCCL and Gloo promise of it is a sum, not the same rounding on every rank. Parts are gathered and
added in rank order, which makes shared tokens equal bit for bit on every rank; at the size of a decode step a
collective costs by the call and not by the byte, so this is no slower.

Shapes: N tokens of this rank, M of all, B of them shared, L own ones of a rank, C and J columns, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leanserve.distributed.ranks import Ranks

__all__ = ["NO_EXCHANGE", "NoExchange", "TokenExchange", "TokenSpread", "columns_to_rank_0"]


@dataclass(frozen=True)
class TokenSpread:
    """Which rank has which of a step's tokens: all ranks the first ones, and after them each its own."""

    num_shared: int
    """B."""
    own_per_rank: tuple[int, ...]
    """L of each rank."""


class NoExchange:
    """The weights at hand are whole: every tensor stays as it is. The methods are those of TokenExchange."""

    def all_tokens(self, x_N: Tensor) -> Tensor:
        return x_N

    def my_tokens(self, part_MJ: Tensor, widths: Sequence[int]) -> Tensor:
        return part_MJ

    def my_columns(self, x_NJ: Tensor, widths: Sequence[int]) -> Tensor:
        return x_NJ

    def summed(self, part_MC: Tensor) -> Tensor:
        return part_MC


NO_EXCHANGE = NoExchange()


class TokenExchange:
    """The exchanges of one step. Every rank calls the same ones in the same order, with N = 0 too.

    In the layout by columns, the shared tokens come first, then each rank's own in rank order.
    """

    def __init__(self, ranks: Ranks, spread: TokenSpread) -> None:
        self._ranks = ranks
        self._shared = spread.num_shared
        self._own = spread.own_per_rank
        self._only_shared = not any(spread.own_per_rank)

    def all_tokens(self, x_N: Tensor) -> Tensor:
        """From this rank's tokens [N, ...] to all [M, ...], all columns: an all-gather of what is not shared."""
        if self._only_shared:
            return x_N
        longest = max(self._own)
        shared, mine = x_N[: self._shared], x_N[self._shared :]
        padded = mine.new_zeros((longest, *mine.shape[1:]))
        padded[: mine.shape[0]] = mine
        by_rank = self._ranks.all_gather(padded)
        return torch.cat([shared, *(rows[:count] for rows, count in zip(by_rank, self._own, strict=True))])

    def my_tokens(self, part_MJ: Tensor, widths: Sequence[int]) -> Tensor:
        """From the layout by columns [M, J_r] to that by token [N, J].

        Args:
            widths: J_r of every rank.
        """
        padded_MJ = F.pad(part_MJ, (0, max(widths) - part_MJ.shape[1]))
        parts_RNJ = self._everybodys_parts(padded_MJ)
        return torch.cat([part[:, :width] for part, width in zip(parts_RNJ, widths, strict=True)], dim=1)

    def my_columns(self, x_NJ: Tensor, widths: Sequence[int]) -> Tensor:
        """From the layout by token [N, J] to that by columns [M, J_r].

        Args:
            widths: J_r of every rank.
        """
        pieces = x_NJ.split(list(widths), dim=1)
        rank = self._ranks.rank
        if self._only_shared:
            return pieces[rank]
        outgoing = torch.cat([piece[self._shared :].reshape(-1) for piece in pieces])
        mine = self._own[rank]
        sizes = [rows * widths[rank] for rows in self._own]
        received = self._ranks.all_to_all(outgoing, [mine * width for width in widths], sizes)
        return torch.cat([pieces[rank][: self._shared], received.view(sum(self._own), widths[rank])])

    def summed(self, part_MC: Tensor) -> Tensor:
        """The sum over ranks of [M, C], for this rank's tokens: [N, C], added in rank order in float32."""
        first, *others = self._everybodys_parts(part_MC)
        total_NC = first.float()
        for other in others:
            total_NC = total_NC + other
        return total_NC.to(part_MC.dtype)

    def _everybodys_parts(self, part_MJ: Tensor) -> Tensor:
        """What each rank computed for this rank's tokens: [R, N, J]."""
        if self._only_shared:
            return self._ranks.all_gather(part_MJ)
        shared, *own = part_MJ.split((self._shared, *self._own))
        outgoing = torch.cat([rows for theirs in own for rows in (shared, theirs)])
        counts = [self._shared + rows for rows in self._own]
        mine = counts[self._ranks.rank]
        return self._ranks.all_to_all(outgoing, counts, [mine] * len(counts)).view(len(counts), mine, part_MJ.shape[1])


def columns_to_rank_0(part_MJ: Tensor, widths: Sequence[int], ranks: Ranks) -> Tensor | None:
    """[M, J] of all ranks' columns, on rank 0; the others get None. M is the same everywhere.

    Args:
        widths: J_r of every rank.
    """
    rows = part_MJ.shape[0]
    first = ranks.rank == 0
    send = [part_MJ.numel()] + [0] * (ranks.size - 1)
    received = ranks.all_to_all(part_MJ.reshape(-1), send, [rows * width if first else 0 for width in widths])
    if not first:
        return None
    pieces = received.split([rows * width for width in widths])
    return torch.cat([piece.view(rows, width) for piece, width in zip(pieces, widths, strict=True)], dim=1)
