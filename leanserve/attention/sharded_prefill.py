"""Many new tokens per sequence, each computed by the rank that owns its page: queries and states travel, keys never.

Shapes: Q query tokens of all ranks' prefill chunks, L of them this rank's own, H query heads, D head dim, R ranks.
"""

from dataclasses import dataclass

import torch

from lean_attention import AttentionState, Backend, PagedKV, lean_prefill, merge_states
from leanserve.distributed.ranks import Ranks

__all__ = ["PrefillShare", "sharded_prefill"]


@dataclass(frozen=True)
class PrefillShare:
    """Who computes which of a step's prefill tokens: each belongs to the rank that owns its page.

    Tokens stand in the order of the step's rows (sequence by sequence, by position); a rank's own keep that order.
    """

    q_offsets: torch.Tensor
    """int32 [B + 1]: sequence b's tokens are q_offsets[b] to q_offsets[b + 1]."""
    positions_Q: torch.Tensor
    """int32, absolute."""
    tokens_per_rank: tuple[int, ...]
    """L of each rank."""
    padded_rows_Q: torch.Tensor
    """int64: each token's row in the ranks' queries, stacked by rank and padded to the largest L."""
    by_owner_Q: torch.Tensor
    """int64: the tokens grouped by owner, in rank order."""


def sharded_prefill(
    q_LHD: torch.Tensor,
    kv: PagedKV,
    share: PrefillShare,
    ranks: Ranks,
    *,
    window: int | None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Causal attention of this rank's L query tokens over every rank's pages.

    All-gather of the queries; partial attention of all Q queries over the local pages, masked by absolute position; one
    packed all-to-all of the states to each token's owner; merge in rank order. Every rank must call it, with L = 0 too.

    Args:
        q_LHD: this rank's own tokens.
        kv: this rank's pages of the B sequences.

    Returns:
        [L, H, D] in q's dtype.
    """

    def attend(q_QHD: torch.Tensor) -> AttentionState:
        return lean_prefill(q_QHD, kv, share.q_offsets, share.positions_Q, window=window, backend=backend)

    if ranks.size == 1:
        return attend(q_LHD).out.to(q_LHD.dtype)
    local = attend(_everybodys_queries(q_LHD, share, ranks))
    return _states_of_mine(local, share, ranks, backend).out.to(q_LHD.dtype)


def _everybodys_queries(q_LHD: torch.Tensor, share: PrefillShare, ranks: Ranks) -> torch.Tensor:
    """[Q, H, D] in the order of the step's rows."""
    padded = q_LHD.new_zeros((max(share.tokens_per_rank), *q_LHD.shape[1:]))
    padded[: q_LHD.shape[0]] = q_LHD
    return ranks.all_gather(padded).flatten(0, 1)[share.padded_rows_Q]


def _states_of_mine(
    local: AttentionState, share: PrefillShare, ranks: Ranks, backend: Backend | None
) -> AttentionState:
    """All ranks' states of this rank's tokens, merged."""
    _, H, D = local.out.shape
    packed = torch.cat([local.out.flatten(1), local.lse], dim=1)[share.by_owner_Q]
    mine = share.tokens_per_rank[ranks.rank]
    packed_RLJ = ranks.all_to_all(packed, list(share.tokens_per_rank), [mine] * ranks.size).view(
        ranks.size, mine, H * (D + 1)
    )
    out_RLHD, lse_RLH = packed_RLJ[..., : H * D].unflatten(-1, (H, D)), packed_RLJ[..., H * D :]
    return merge_states(out_RLHD, lse_RLH, backend=backend)
