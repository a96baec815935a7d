"""Stream-K decode attention over paged keys: one launch, no waiting, any mix of lengths.

Each CTA walks its run of tiles (see schedule.py), crossing row borders, with an online softmax in base 2. A row that it
covers whole it writes at once; of any other it leaves a piece (sums, maximum, denominator) in scratch memory and adds
one to the row's arrival counter. Whoever finds itself last merges the pieces, in piece order, so that equal inputs
give equal bits whoever that is. No CTA ever waits for another: the launch needs no co-residency and cannot deadlock
beside NCCL or another stream. Rows of many pieces merge in two levels. The last one sets the counter back to zero.

The query heads of a group share their keys, so they are the rows of one matrix (padded to 16) and a tile is read once.

Constexpr: head dim, group, tile, page size, dtypes (by pointer) and which options are on. Lengths, batch, grid and
windows are runtime values and are never specialised on.

Shapes: B sequences, H query heads, K KV heads, M query heads of a group (padded), D head dim (padded), P pages, T
tokens of a page, N tokens of a tile, S pieces, G CTAs.
"""

# Triton's kernel language is not Python's to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_attention.paged_kv import PagedKV
from lean_attention.pieces import holder, merge_pieces, store_piece
from lean_attention.state import AttentionState
from lean_attention.stream_k_plan import HEADER, StreamKPlan, plan_stream_k
from lean_attention.tile_walk import LOG2E, finish, walk
from lean_attention.tuning import (
    arch_family,
    decode_launch,
    dot_precision,
    head_block,
    interpreting,
    kernel_page_tokens,
)

__all__ = ["StreamKPlan", "decode", "decode_constants", "plan_stream_k"]

MERGE_ELEMENTS = 4096
"""Partial sums that a merging CTA loads at once: 32 registers of each of 128 threads. Twice as many spill in Triton
3.6, from groups of 16 at head dim 128 on."""


@triton.jit
def _write_row(
    out_ptr, lse_ptr, sinks_ptr, v_scale_ptr, sequence, kv_head, kv_heads, acc, m, den,
    M: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write the states of a group's heads from their sums acc [M, D], maxima m [M] and denominators den [M]."""
    g, d = tl.arange(0, M), tl.arange(0, D)
    inside = g < GROUP
    sinks_ptrs = None if sinks_ptr is None else sinks_ptr + kv_head * GROUP + g
    out, lse = finish(acc, m, den, sinks_ptrs, v_scale_ptr, inside)
    row = (sequence.to(tl.int64) * kv_heads + kv_head) * GROUP + g  # [M]
    tl.store(lse_ptr + row, lse, mask=inside)
    out_mask = inside[:, None] & (d[None, :] < HEAD_DIM)
    tl.store(out_ptr + row[:, None] * HEAD_DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(
    do_not_specialize=["window", "batch", "kv_heads", "num_ctas", "table_width", "table_stride", "positions_stride"]
)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, positions_ptr, lengths_ptr, q_positions_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr,
    work_ptr, scratch_ptr, out_ptr, lse_ptr,
    scale_log2, softcap, window, batch, kv_heads, num_ctas, table_width, table_stride, positions_stride,
    q_stride_b, q_stride_h, k_stride_p, k_stride_h, k_stride_t, v_stride_p, v_stride_h, v_stride_t,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, FAN_IN: tl.constexpr,
    SPLIT: tl.constexpr, D: tl.constexpr, M_DOT: tl.constexpr, M_MERGE: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cta = tl.program_id(0)
    before_ptr = work_ptr + HEADER
    first_tile_ptr = before_ptr + batch + 1
    empty_ptr = first_tile_ptr + batch
    first_sequence_ptr = empty_ptr + batch
    counters_ptr = first_sequence_ptr + num_ctas
    sums_ptr = scratch_ptr
    stats_ptr = scratch_ptr + num_ctas.to(tl.int64) * 2 * GROUP * HEAD_DIM
    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr)

    total = tl.load(work_ptr)
    num_empty = tl.load(work_ptr + 2)
    if SPLIT == 0:
        parts = tl.load(work_ptr + 1)
        sequence = tl.load(first_sequence_ptr + cta)
        part, line_start = cta, cta * 0
    else:
        # Every row is a line of its own, dealt to SPLIT CTAs.
        sequence = cta // SPLIT // kv_heads
        tiles = tl.load(before_ptr + sequence + 1) - tl.load(before_ptr + sequence)
        parts = tl.minimum(tiles, SPLIT)
        part, total = cta % SPLIT, tiles
        line_start = tl.load(before_ptr + sequence) * kv_heads + (cta // SPLIT % kv_heads) * tiles
    base, extra = total // tl.maximum(parts, 1), total % tl.maximum(parts, 1)
    line = line_start + part * base + tl.minimum(part, extra)
    stop = tl.where(part < parts, line + base + tl.where(part < extra, 1, 0), line)
    stop = tl.where(total > 0, stop, line)

    m_rows = tl.arange(0, M_DOT)
    d = tl.arange(0, D)
    while line < stop:
        row_begin = tl.load(before_ptr + sequence)
        tiles = tl.load(before_ptr + sequence + 1) - row_begin
        row_begin *= kv_heads
        kv_head = (line - row_begin) // tiles
        row_begin += kv_head * tiles
        first = line - row_begin
        last = tl.minimum(tiles, stop - row_begin)
        length = tl.load(lengths_ptr + sequence)
        origin = tl.load(first_tile_ptr + sequence)
        oldest = 0
        if window is not None:
            newest = length - 1
            if q_positions_ptr is not None:
                newest = tl.load(q_positions_ptr + sequence)
            oldest = newest - window + 1

        wide = sequence.to(tl.int64)
        q_rows = q_ptr + wide * q_stride_b + (kv_head * GROUP + m_rows).to(tl.int64)[:, None] * q_stride_h
        q = tl.load(q_rows + d[None, :], mask=(m_rows[:, None] < GROUP) & (d[None, :] < HEAD_DIM), other=0.0)  # [M, D]
        acc = tl.zeros((M_DOT, D), tl.float32)
        m = tl.full((M_DOT,), float("-inf"), tl.float32)
        den = tl.zeros((M_DOT,), tl.float32)
        k_head_ptr = k_ptr + kv_head.to(tl.int64) * k_stride_h
        v_head_ptr = v_ptr + kv_head.to(tl.int64) * v_stride_h
        row_table_ptr = table_ptr + wide * table_stride
        row_positions_ptr = None if positions_ptr is None else positions_ptr + wide * positions_stride
        # Tiles inside `length` need no mask; with a window, any tile may.
        masked_from = origin + first
        if window is None:
            full = tl.maximum(tl.minimum(origin + last, length // N), origin + first)
            acc, m, den = walk(
                q, acc, m, den, origin + first, full, length, 0, oldest, oldest,
                k_head_ptr, v_head_ptr, row_table_ptr, row_positions_ptr, table_width,
                k_stride_p, k_stride_t, v_stride_p, v_stride_t, scale_log2, softcap,
                HEAD_DIM, D, N, PAGE, False, False, False, PRECISION, UPCAST, STAGES,
            )  # fmt: skip
            masked_from = full
        acc, m, den = walk(
            q, acc, m, den, masked_from, origin + last, length, 0, oldest, oldest,
            k_head_ptr, v_head_ptr, row_table_ptr, row_positions_ptr, table_width,
            k_stride_p, k_stride_t, v_stride_p, v_stride_t, scale_log2, softcap,
            HEAD_DIM, D, N, PAGE, True, False, window is not None, PRECISION, UPCAST,
            STAGES if window is not None else 1,
        )  # fmt: skip

        if last - first == tiles:
            _write_row(
                out_ptr, lse_ptr, sinks_ptr, v_scale_ptr, sequence, kv_head, kv_heads, acc, m, den,
                M_DOT, D, GROUP, HEAD_DIM,
            )  # fmt: skip
        else:
            row_part = holder(row_begin - line_start, total, parts)
            pieces = holder(row_begin - line_start + tiles - 1, total, parts) - row_part + 1
            row_cta = row_part + cta - part
            piece = cta - row_cta
            store_piece(
                sums_ptr, stats_ptr, 2 * cta + tl.where(piece == 0, 1, 0), acc, m, den, M_DOT, D, GROUP, HEAD_DIM
            )
            # schedule.merge_groups
            width = tl.where(pieces > FAN_IN, 2, FAN_IN)
            while (width * width < pieces) & (width < pieces):
                width *= 2
            step = tl.full((), 1, tl.int32)
            level_ptr = counters_ptr + row_cta
            going = True
            while going:
                leader = piece // (step * width) * (step * width)
                count = tl.cdiv(tl.minimum(step * width, pieces - leader), step)
                arrived = count - 1
                if count > 1:
                    # Every thread's stores come before the arrival that announces them.
                    tl.debug_barrier()
                    arrived = tl.atomic_add(level_ptr + leader, 1, sem="acq_rel", scope="gpu")
                going = arrived == count - 1
                if going & (count > 1):
                    tl.debug_barrier()
                    sum_acc, sum_m, sum_den = merge_pieces(
                        sums_ptr, stats_ptr, row_cta, leader, count, step, S, M_MERGE, D, GROUP, HEAD_DIM
                    )
                    tl.store(level_ptr + leader, 0)
                    if step * width >= pieces:
                        _write_row(
                            out_ptr, lse_ptr, sinks_ptr, v_scale_ptr, sequence, kv_head, kv_heads,
                            sum_acc, sum_m, sum_den, M_MERGE, D, GROUP, HEAD_DIM,
                        )  # fmt: skip
                    else:
                        # The group's sum takes its first piece's place, once every thread has read that.
                        tl.debug_barrier()
                        slot = 2 * (row_cta + leader) + tl.where(leader == 0, 1, 0)
                        store_piece(sums_ptr, stats_ptr, slot, sum_acc, sum_m, sum_den, M_MERGE, D, GROUP, HEAD_DIM)
                step *= width
                level_ptr += num_ctas
                going = going & (step < pieces)
        line += last - first
        if line < stop:
            # On to the row's neighbour: the next head, or the next sequence that has tiles.
            while tl.load(before_ptr + sequence + 1) * kv_heads <= line:
                sequence += 1

    for index in range(cta, num_empty * kv_heads, num_ctas):
        empty_sequence = tl.load(empty_ptr + index // kv_heads)
        _write_row(
            out_ptr, lse_ptr, sinks_ptr, v_scale_ptr, empty_sequence, index % kv_heads, kv_heads,
            tl.zeros((M_MERGE, D), tl.float32), tl.full((M_MERGE,), float("-inf"), tl.float32),
            tl.zeros((M_MERGE,), tl.float32), M_MERGE, D, GROUP, HEAD_DIM,
        )  # fmt: skip


def decode_constants(
    head_dim: int, group: int, *, tile: int, page_tokens: int, num_stages: int, fan_in: int, fixed_split: int = 0,
    precision: str = "ieee",
) -> dict[str, int | bool | str]:  # fmt: skip
    """The constexpr arguments of `decode_kernel`."""
    block, rows = head_block(head_dim), triton.next_power_of_2(group)
    return {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "N": tile,
        "PAGE": page_tokens,
        "FAN_IN": fan_in,
        "SPLIT": fixed_split,
        "D": block,
        "M_DOT": max(16, rows),
        "M_MERGE": rows,
        "S": max(1, min(triton.next_power_of_2(fan_in), MERGE_ELEMENTS // (rows * block))),
        "PRECISION": precision,
        "UPCAST": interpreting(),
        "STAGES": num_stages,
    }


def decode(
    q: Tensor,
    kv: PagedKV,
    plan: StreamKPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    q_positions: Tensor | None = None,
) -> AttentionState:
    """The attention of q [B, H, D] over `kv`, as dealt out by `plan`; arguments as in `lean_attention.lean_decode`.

    window and q_positions must be those of the plan. Raises ValueError if the plan was made for other shapes.
    """
    B, H, D = q.shape
    planned = (plan.num_sequences, plan.num_kv_heads * plan.group, plan.num_kv_heads, plan.head_dim, plan.page_tokens)
    given = (B, H, kv.num_kv_heads, kv.head_dim, kv.page_tokens)
    if planned != given:
        raise ValueError(
            f"the plan is for (sequences, query heads, KV heads, head dim, page tokens) {planned}, the call has "
            f"{given}; make a plan for each shape"
        )
    if q.stride(2) != 1:
        q = q.contiguous()
    out = torch.empty((B, H, D), dtype=out_dtype, device=q.device)
    lse = torch.empty((B, H), dtype=torch.float32, device=q.device)
    if B == 0:
        return AttentionState(out, lse)
    table_width, family = kv.page_table.shape[1], arch_family(q.device)
    decode_kernel[(plan.num_ctas,)](
        q, kv.k, kv.v, kv.page_table, kv.page_positions if window is not None else None, kv.lengths,
        q_positions if window is not None else None, sinks, kv.k_scale, kv.v_scale,
        plan.work, plan.scratch, out, lse,
        scale / softcap * LOG2E.value if softcap else scale * LOG2E.value, softcap, window,
        B, kv.num_kv_heads, plan.num_ctas, table_width, kv.page_table.stride(0),
        0 if kv.page_positions is None else kv.page_positions.stride(0),
        q.stride(0), q.stride(1), *kv.k.stride()[:3], *kv.v.stride()[:3],
        **decode_constants(
            D, plan.group, tile=plan.tile, page_tokens=kernel_page_tokens(kv), num_stages=plan.num_stages,
            fan_in=plan.fan_in, fixed_split=plan.fixed_split,
            precision=dot_precision(q.dtype, family),
        ),
        **decode_launch(plan.num_warps, plan.num_stages, plan.ctas_per_sm, family),
    )  # fmt: skip
    return AttentionState(out, lse)
