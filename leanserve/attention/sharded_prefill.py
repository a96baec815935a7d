"""Many new tokens per sequence, keys on all ranks."""

import torch

from lean_attention import PagedKV, lean_prefill
from leanserve.distributed.combine import combine
from leanserve.distributed.ranks import Ranks

__all__ = ["sharded_prefill"]


def sharded_prefill(
    q_NHD: torch.Tensor,
    kv: PagedKV,
    q_offsets: torch.Tensor,
    q_positions_N: torch.Tensor,
    ranks: Ranks,
    *,
    window: int | None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal attention of the N query tokens of B sequences over every rank's pages.

    Every rank computes all N hidden states and holds the keys of its own pages only.

    Args:
        q_NHD: the same on all ranks; sequence b's queries are rows q_offsets[b] to q_offsets[b + 1].
        q_offsets: int32 [B + 1].
        q_positions_N: int32, absolute positions: a query sees keys at or before its own.

    Returns:
        [N, H, D] float32, bit for bit equal on every rank.
    """
    local = lean_prefill(q_NHD, kv, q_offsets, q_positions_N, window=window, backend=backend)
    return combine(local, ranks).out
