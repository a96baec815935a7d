"""Merging N attention states into one, in one launch.

Shapes: N states, B sequences or tokens, H query heads, D head dim (padded to a power of two), R rows (a row is one
head of one sequence), S states of one load.
"""

# Triton's kernel language is not Python's to a type checker.
# pyright: reportCallIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_attention.state import AttentionState
from lean_attention.tuning import head_block, interpreting

STATES_AT_ONCE = 8
"""States whose loads are in flight together: the ranks of one machine."""

ROWS_AT_ONCE = 4
"""Rows of a CTA of four warps: 32 registers of each thread for 8 states of 128."""


@triton.jit(
    do_not_specialize=[
        "states", "rows", "heads",
        "out_stride_n", "out_stride_b", "out_stride_h", "lse_stride_n", "lse_stride_b", "lse_stride_h",
    ]
)  # fmt: skip
def merge_kernel(
    out_parts_ptr, lse_parts_ptr, out_ptr, lse_ptr, states, rows, heads,
    out_stride_n, out_stride_b, out_stride_h, lse_stride_n, lse_stride_b, lse_stride_h,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """R rows of the merge; states are summed in the order given, S at a time. Strides of out are multiples of ALIGN."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # [R]
    b, h = row // heads, row % heads
    s, d = tl.arange(0, S), tl.arange(0, D)
    acc = tl.zeros((R, D), tl.float32)
    den = tl.zeros((R,), tl.float32)
    m = tl.full((R,), float("-inf"), tl.float32)
    for start in range(0, states, S):
        n = (start + s).to(tl.int64)  # [S]
        there = (row < rows)[:, None] & (n < states)[None, :]  # [R, S]
        lse_rows = b * lse_stride_b + h * lse_stride_h
        lse_RS = tl.load(lse_parts_ptr + lse_rows[:, None] + n[None, :] * lse_stride_n, mask=there, other=float("-inf"))
        # Strides go by the batch, so they are not specialised on; this is what a load of several elements must know.
        out_rows = tl.multiple_of(b * out_stride_b + h * out_stride_h, ALIGN)
        offsets = out_rows[:, None] + tl.multiple_of(n * out_stride_n, ALIGN)[None, :]  # [R, S]
        read = there[:, :, None] & (d[None, None, :] < HEAD_DIM)
        parts_RSD = tl.load(out_parts_ptr + offsets[:, :, None] + d[None, None, :], mask=read, other=0.0)
        m_new = tl.maximum(m, tl.max(lse_RS, axis=1))
        # Where every state so far is empty, -inf - -inf would be NaN.
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight_RS = tl.exp(lse_RS - top[:, None])
        decay = tl.exp(m - top)
        # An empty state takes no part, whatever its out holds.
        parts_RSD = tl.where(weight_RS[:, :, None] > 0, parts_RSD.to(tl.float32), 0.0)
        acc = acc * decay[:, None] + tl.sum(parts_RSD * weight_RS[:, :, None], axis=1)
        den = den * decay + tl.sum(weight_RS, axis=1)
        m = m_new
    some = den > 0
    out = acc / tl.where(some, den, 1.0)[:, None]
    lse = tl.where(some, m + tl.log(tl.where(some, den, 1.0)), float("-inf"))
    inside = (row < rows)[:, None] & (d[None, :] < HEAD_DIM)
    tl.store(out_ptr + row[:, None] * HEAD_DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + row, lse, mask=row < rows)


def merge_constants(head_dim: int, heads: int, strides: tuple[int, ...], *, rows: int = ROWS_AT_ONCE) -> dict[str, int]:
    """The constexpr arguments of `merge_kernel`.

    strides: of out, in elements. Those of states that lie side by side are multiples of H or D, whatever N and B.
    """
    align = math.gcd(16, heads, *strides)
    return {"HEAD_DIM": head_dim, "D": head_block(head_dim), "R": rows, "S": STATES_AT_ONCE, "ALIGN": align}


def merge_states(out_NBHD: Tensor, lse_NBH: Tensor) -> AttentionState:
    """`lean_attention.merge_states` on the device; any strides, so that gathered buffers need no copy."""
    N, B, H, D = out_NBHD.shape
    if D > 1 and out_NBHD.stride(3) != 1:
        out_NBHD = out_NBHD.contiguous()
    out = torch.empty((B, H, D), dtype=out_NBHD.dtype, device=out_NBHD.device)
    lse = torch.empty((B, H), dtype=torch.float32, device=out_NBHD.device)
    if B * H > 0:
        # The interpreter's time goes by programs, a GPU's by bytes in flight.
        strides = out_NBHD.stride()[:3]
        constants = merge_constants(D, H, strides, rows=64 if interpreting() else ROWS_AT_ONCE)
        merge_kernel[(triton.cdiv(B * H, constants["R"]),)](
            out_NBHD, lse_NBH, out, lse, N, B * H, H, *strides, *lse_NBH.stride(),
            **constants, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return AttentionState(out, lse)
