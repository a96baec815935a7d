"""The reducer: every rank's partial attention state -> the state over everybody's keys.

Softmax attention over a set of keys is a state (out, lse); states of disjoint key sets merge associatively and
commutatively into the state of their union (`lean_attention.AttentionState`). So ranks exchange states, never keys.
"""

import torch

from lean_attention import AttentionState, Backend, merge_states
from leanserve.distributed.ranks import Ranks

__all__ = ["combine"]


def combine(local: AttentionState, ranks: Ranks, *, backend: Backend | None = None) -> AttentionState:
    """Merge the ranks' states of the same queries: one packed all-gather, one merge in rank order.

    Args:
        local: `out` [B, H, D] and `lse` [B, H], float32, over this rank's keys; the identity (0, -inf) where it has
            none.
        backend: of the merge, None for the device's own.

    Returns:
        The same shapes over all keys, bit for bit equal on every rank.
    """
    if ranks.size == 1:
        return local
    out_BHD, lse_BH = local.out, local.lse
    packed = torch.cat([out_BHD.reshape(-1), lse_BH.reshape(-1)])
    packed_R = ranks.all_gather(packed)
    out_RBHD = packed_R[:, : out_BHD.numel()].view(ranks.size, *out_BHD.shape)
    lse_RBH = packed_R[:, out_BHD.numel() :].view(ranks.size, *lse_BH.shape)
    return merge_states(out_RBHD, lse_RBH, backend=backend)
