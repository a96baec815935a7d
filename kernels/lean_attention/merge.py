"""Merging N attention states into one, in one launch.

Shapes: N states, B sequences or tokens, H query heads, D head dim (padded to a power of two), S states of one load.
"""

# Triton's kernel language is not Python's to a type checker.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_attention.state import AttentionState
from lean_attention.tuning import head_block

STATES_AT_ONCE = 8
"""States whose loads are in flight together: the ranks of one machine."""


@triton.jit(do_not_specialize=["states", "heads"])
def merge_kernel(
    out_parts_ptr, lse_parts_ptr, out_ptr, lse_ptr, states, heads,
    out_stride_n, out_stride_b, out_stride_h, lse_stride_n, lse_stride_b, lse_stride_h,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One row (sequence, head) of the merge; states are summed in the order given, S at a time."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    s, d = tl.arange(0, S), tl.arange(0, D)
    acc = tl.zeros((D,), tl.float32)
    den = 0.0
    m = float("-inf")
    for start in range(0, states, S):
        n = (start + s).to(tl.int64)  # [S]
        there = n < states
        lse_offsets = n * lse_stride_n + b * lse_stride_b + h * lse_stride_h
        lse_S = tl.load(lse_parts_ptr + lse_offsets, mask=there, other=float("-inf"))
        offsets = n * out_stride_n + b * out_stride_b + h * out_stride_h
        read = there[:, None] & (d[None, :] < HEAD_DIM)
        part_SD = tl.load(out_parts_ptr + offsets[:, None] + d[None, :], mask=read, other=0.0).to(tl.float32)
        m_new = tl.maximum(m, tl.max(lse_S, axis=0))
        # Where every state so far is empty, -inf - -inf would be NaN.
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight_S = tl.exp(lse_S - top)
        decay = tl.exp(m - top)
        # An empty state takes no part, whatever its out holds.
        part_SD = tl.where(weight_S[:, None] > 0, part_SD, 0.0)
        acc = acc * decay + tl.sum(part_SD * weight_S[:, None], axis=0)
        den = den * decay + tl.sum(weight_S, axis=0)
        m = m_new
    some = den > 0
    out = acc / tl.where(some, den, 1.0)
    lse = tl.where(some, m + tl.log(tl.where(some, den, 1.0)), float("-inf"))
    tl.store(out_ptr + row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + row, lse)


def merge_constants(head_dim: int) -> dict[str, int]:
    """The constexpr arguments of `merge_kernel`."""
    return {"HEAD_DIM": head_dim, "D": head_block(head_dim), "S": STATES_AT_ONCE}


def merge_states(out_NBHD: Tensor, lse_NBH: Tensor) -> AttentionState:
    """`lean_attention.merge_states` on the device; any strides, so that gathered buffers need no copy."""
    N, B, H, D = out_NBHD.shape
    if D > 1 and out_NBHD.stride(3) != 1:
        out_NBHD = out_NBHD.contiguous()
    out = torch.empty((B, H, D), dtype=out_NBHD.dtype, device=out_NBHD.device)
    lse = torch.empty((B, H), dtype=torch.float32, device=out_NBHD.device)
    if B * H > 0:
        merge_kernel[(B * H,)](
            out_NBHD, lse_NBH, out, lse, N, H, *out_NBHD.stride()[:3], *lse_NBH.stride(),
            **merge_constants(D), num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return AttentionState(out, lse)
