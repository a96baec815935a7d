"""Prefill attention over paged keys: blocks of query tokens against the tiles they see, causal by absolute position.

A CTA takes the heads of one group for a run of one sequence's query tokens, so that a tile is read once for the group:
(token, head) pairs are the rows of one matrix. It walks the tiles that some of its tokens may see: first, without
masks, those that all of them see, then the others. Returned are states: on a shard they are partial.

Sequences are found without a plan: sequence b's blocks start at q_offsets[b] // tokens_per_block + b, which leaves
room for every block and at most one idle CTA to a sequence. Later blocks see more keys, so they are started first.

Shapes: Q query tokens of all sequences, H query heads, K KV heads, M rows (tokens x heads of a group), N tokens of a
tile, D head dim padded to a power of two, T tokens of a page.
"""

# Triton's kernel language is not Python's to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_attention.paged_kv import PagedKV
from lean_attention.state import AttentionState
from lean_attention.tile_walk import LOG2E, finish, walk
from lean_attention.tuning import (
    PrefillTuning,
    arch_family,
    check_head_dim,
    dot_precision,
    head_block,
    interpreting,
    kernel_page_tokens,
    prefill_tuning,
)

__all__ = ["prefill", "prefill_constants", "prefill_kernel"]

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _sequence_of(q_offsets_ptr, block, batch, TOKENS: tl.constexpr):
    """The sequence that a block belongs to, and its first block."""
    count, first_block = 0, 0
    for start in range(0, batch, 256):
        b = start + tl.arange(0, 256)
        begins = tl.load(q_offsets_ptr + b, mask=b < batch, other=0) // TOKENS + b
        mine = (b < batch) & (begins <= block)
        count += tl.sum(mine.to(tl.int32), axis=0)
        first_block = tl.maximum(first_block, tl.max(tl.where(mine, begins, 0), axis=0))
    return count - 1, first_block


@triton.jit
def _seen_tokens(positions_ptr, length, earliest, latest, oldest, page_tokens, WINDOWED: tl.constexpr):
    """(first, full, last): queries from `earliest` to `latest` see no token before first or from last on, and without a
    window they all see every token before full."""
    if positions_ptr is None:
        first = tl.maximum(oldest, 0) if WINDOWED else 0
        full = tl.maximum(tl.minimum(length, earliest + 1), 0)
        last = tl.maximum(tl.minimum(length, latest + 1), 0)
    else:
        # Pages may be listed in any order of position.
        first, full, last = length, length, length * 0
        pages = tl.cdiv(length, page_tokens)
        for start in range(0, pages, 512):
            page = start + tl.arange(0, 512)
            listed = page < pages
            # Beyond the last page, page * page_tokens may wrap around: a cache of one page counts as 2^30 tokens long.
            begin = tl.where(listed, page, 0) * page_tokens
            stop = tl.minimum(begin + page_tokens, length)
            position = tl.load(positions_ptr + page, mask=listed, other=0)
            newest = position + stop - begin - 1
            seen = listed & (position <= latest)
            if WINDOWED:
                seen = seen & (newest >= oldest)
            first = tl.minimum(first, tl.min(tl.where(seen, begin, length), axis=0))
            last = tl.maximum(last, tl.max(tl.where(seen, stop, 0), axis=0))
            full = tl.minimum(full, tl.min(tl.where(listed & (newest > earliest), begin, length), axis=0))
    return first, full, last


@triton.jit(do_not_specialize=["window", "batch", "kv_heads", "table_width", "table_stride", "positions_stride"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, positions_ptr, lengths_ptr, q_offsets_ptr, q_positions_ptr, sinks_ptr,
    k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr,
    scale_log2, softcap, window, batch, kv_heads, table_width, table_stride, positions_stride,
    q_stride_n, q_stride_h, k_stride_p, k_stride_h, k_stride_t, v_stride_p, v_stride_h, v_stride_t,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One dimension: the second one of a grid ends at 65,535 blocks.
    kv_head = tl.program_id(0) % kv_heads
    block = tl.num_programs(0) // kv_heads - 1 - tl.program_id(0) // kv_heads
    b, first_block = _sequence_of(q_offsets_ptr, block, batch, TOKENS)
    begin = tl.load(q_offsets_ptr + b) + (block - first_block) * TOKENS
    end = tl.load(q_offsets_ptr + b + 1)
    if begin < end:
        if k_scale_ptr is not None:
            scale_log2 *= tl.load(k_scale_ptr)
        rows = tl.arange(0, M)
        d = tl.arange(0, D)
        token = begin + rows // GROUP  # [M]
        head = kv_head * GROUP + rows % GROUP
        inside = (rows < TOKENS * GROUP) & (token < end)
        q_rows_ptr = q_ptr + token.to(tl.int64) * q_stride_n + head.to(tl.int64) * q_stride_h
        read = inside[:, None] & (d[None, :] < HEAD_DIM)
        q = tl.load(q_rows_ptr[:, None] + d[None, :], mask=read, other=0.0)  # [M, D]
        q_position = tl.load(q_positions_ptr + token, mask=inside, other=-1)
        latest = tl.max(q_position, axis=0)
        earliest = tl.min(tl.where(inside, q_position, FAR), axis=0)
        oldest, horizon = q_position, 0
        if window is not None:
            oldest, horizon = q_position - window + 1, earliest - window + 1
        length = tl.load(lengths_ptr + b)
        row_table_ptr = table_ptr + b.to(tl.int64) * table_stride
        row_positions_ptr = None if positions_ptr is None else positions_ptr + b.to(tl.int64) * positions_stride
        first, full, last = _seen_tokens(row_positions_ptr, length, earliest, latest, horizon, PAGE, window is not None)
        first_tile = first // N
        last_tile = tl.where(last > first, tl.cdiv(last, N), first_tile)

        acc = tl.zeros((M, D), tl.float32)
        m = tl.full((M,), float("-inf"), tl.float32)
        den = tl.zeros((M,), tl.float32)
        k_head_ptr = k_ptr + kv_head.to(tl.int64) * k_stride_h
        v_head_ptr = v_ptr + kv_head.to(tl.int64) * v_stride_h
        masked_from = first_tile
        if window is None:
            masked_from = tl.maximum(tl.minimum(full // N, last_tile), first_tile)
            acc, m, den = walk(
                q, acc, m, den, first_tile, masked_from, length, 0, 0, 0,
                k_head_ptr, v_head_ptr, row_table_ptr, row_positions_ptr, table_width,
                k_stride_p, k_stride_t, v_stride_p, v_stride_t, scale_log2, softcap,
                HEAD_DIM, D, N, PAGE, False, False, False, PRECISION, UPCAST, STAGES,
            )  # fmt: skip
        acc, m, den = walk(
            q, acc, m, den, masked_from, last_tile, length, q_position[:, None], oldest[:, None], horizon,
            k_head_ptr, v_head_ptr, row_table_ptr, row_positions_ptr, table_width,
            k_stride_p, k_stride_t, v_stride_p, v_stride_t, scale_log2, softcap,
            HEAD_DIM, D, N, PAGE, True, True, window is not None, PRECISION, UPCAST, STAGES,
        )  # fmt: skip
        sinks_ptrs = None if sinks_ptr is None else sinks_ptr + head
        out, lse = finish(acc, m, den, sinks_ptrs, v_scale_ptr, inside)
        row = token.to(tl.int64) * (kv_heads * GROUP) + head
        tl.store(lse_ptr + row, lse, mask=inside)
        tl.store(out_ptr + row[:, None] * HEAD_DIM + d[None, :], out, mask=read)


def prefill_constants(
    head_dim: int, group: int, *, rows: int, tile: int, page_tokens: int, num_stages: int, precision: str = "ieee"
) -> dict[str, int | bool | str]:
    """The constexpr arguments of `prefill_kernel`."""
    rows = max(rows, triton.next_power_of_2(group))
    return {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "TOKENS": rows // group,
        "M": rows,
        "N": tile,
        "D": head_block(head_dim),
        "PAGE": page_tokens,
        "PRECISION": precision,
        "UPCAST": interpreting(),
        "STAGES": num_stages,
    }


def prefill(
    q: Tensor,
    kv: PagedKV,
    q_offsets: Tensor,
    q_positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tuning: PrefillTuning | None = None,
) -> AttentionState:
    """The attention of q [Q, H, D] over `kv`; arguments as in `lean_attention.lean_prefill`, states in float32.

    tuning: default `tuning.prefill_tuning`. Raises ValueError for a head dim beyond 256.
    """
    check_head_dim("prefill", kv.head_dim)
    Q, H, D = q.shape
    B, K = kv.num_sequences, kv.num_kv_heads
    out = torch.empty((Q, H, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((Q, H), dtype=torch.float32, device=q.device)
    if Q == 0:
        return AttentionState(out, lse)
    if q.stride(2) != 1:
        q = q.contiguous()
    family = arch_family(q.device)
    if tuning is None:
        tuning = prefill_tuning(D, q.dtype, family)
    constants = prefill_constants(
        D, H // K, rows=tuning.rows, tile=tuning.tile, page_tokens=kernel_page_tokens(kv),
        num_stages=tuning.num_stages, precision=dot_precision(q.dtype, family),
    )  # fmt: skip
    prefill_kernel[(K * (Q // int(constants["TOKENS"]) + B),)](
        q, kv.k, kv.v, kv.page_table, kv.page_positions, kv.lengths, q_offsets, q_positions, sinks,
        kv.k_scale, kv.v_scale, out, lse,
        scale / softcap * LOG2E.value if softcap else scale * LOG2E.value, softcap, window,
        B, K, kv.page_table.shape[1], kv.page_table.stride(0),
        0 if kv.page_positions is None else kv.page_positions.stride(0),
        q.stride(0), q.stride(1), *kv.k.stride()[:3], *kv.v.stride()[:3],
        **constants, num_warps=tuning.num_warps, num_stages=tuning.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return AttentionState(out, lse)
