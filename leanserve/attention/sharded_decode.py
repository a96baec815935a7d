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
        [B, H, D] float32, bit for bit equal on every rank.
    """
    local = lean_decode(q_BHD, kv, plan)
    return combine(local, ranks, backend=plan.backend).out
