"""One new token per sequence, keys on all ranks: the product, in two lines."""

import torch

from lean_attention import DecodePlan, PagedKV, lean_decode
from leanserve.distributed.combine import combine
from leanserve.distributed.ranks import Ranks

__all__ = ["sharded_decode"]


def sharded_decode(q_BHD: torch.Tensor, kv: PagedKV, plan: DecodePlan, ranks: Ranks) -> torch.Tensor:
    """Attention of one query token per sequence over every rank's pages.

    Args:
        q_BHD: the same on all ranks.
        kv: this rank's pages of the B sequences; owning none of a sequence is the ordinary case.
        plan: from `plan_decode`, once per step.

    Returns:
        [B, H, D] in q's dtype, bit for bit equal on every rank.
    """
    # States that will be merged are float32; one that is the whole result is rounded where it is computed.
    out_dtype = q_BHD.dtype if ranks.size == 1 else torch.float32
    local = lean_decode(q_BHD, kv, plan, out_dtype=out_dtype)
    return combine(local, ranks, backend=plan.backend).out.to(q_BHD.dtype)
