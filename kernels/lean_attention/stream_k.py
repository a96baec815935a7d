"""Stream-K decode attention over paged keys: one launch, no waiting, any mix of lengths.

Each CTA walks its run of tiles (see schedule.py), crossing row borders, with an online softmax in base 2. A row that it
covers whole it writes at once; of any other it leaves a piece (sums, maximum, denominator) in scratch memory and adds one
to the row's arrival counter. Whoever finds itself last merges the pieces, in piece order, so that equal inputs give equal
bits whoever that is. No CTA ever waits for another: the launch needs no co-residency and cannot deadlock beside NCCL or
another stream. Rows of many pieces merge in two levels. The last one sets the counter back to zero.

The query heads of a group share their keys, so they are the rows of one matrix (padded to 16) and a tile is read once.

Constexpr: head dim, group, tile, page size, dtypes (by pointer) and which options are on. Lengths, batch, grid and windows
are runtime values and are never specialised on.

Shapes: B sequences, H query heads, K KV heads, M query heads of a group (padded), D head dim (padded), P pages, T tokens of
a page, N tokens of a tile, S pieces, G CTAs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_attention.paged_kv import PagedKV
from lean_attention.state import AttentionState
from lean_attention.stream_k_plan import HEADER, StreamKPlan, plan_stream_k
from lean_attention.tuning import head_block, interpreting

__all__ = ["StreamKPlan", "decode", "decode_constants", "plan_stream_k"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MERGE_ELEMENTS = 8192
"""Partial sums that a merging CTA loads at once: 64 registers of each of 128 threads."""


@triton.jit
def online_softmax(q, k, v, acc, m, l, seen, scale_log2, softcap, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Attend to one tile: q [M, D], k and v [N, D], acc [M, D], m and l [M] (base 2), seen [M or 1, N]."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if UPCAST:
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [M, N]
    if softcap is not None:
        # scale_log2 already holds 1 / softcap: logits are (x / softcap) * log2(e), and tanh(x) = 1 - 2 / (exp(2x) + 1).
        logits = (1.0 - 2.0 / (tl.exp2(2.0 * logits) + 1.0)) * (softcap * LOG2E)
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    m_new = tl.maximum(m, tl.max(logits, axis=1))
    # Where nothing has been seen yet, -inf - -inf would be NaN.
    top = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(logits - top[:, None])  # [M, N]
    decay = tl.exp2(m - top)
    l = l * decay + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, m_new, l


@triton.jit
def _locate(table_ptr, positions_ptr, tile, length, table_width, N: tl.constexpr, PAGE: tl.constexpr):
    """A tile's page and the absolute position of its first token; where a tile spans pages, those of each token [N]."""
    if PAGE % N == 0:
        token = tile * N
        index = tl.minimum(token // PAGE, table_width - 1)
        page, position = tl.load(table_ptr + index), token
        if positions_ptr is not None:
            position = tl.load(positions_ptr + index) + token % PAGE
    else:
        token = tile * N + tl.arange(0, N)
        page, position = tl.load(table_ptr + token // PAGE, mask=token < length, other=0), token
        if positions_ptr is not None:
            position = tl.load(positions_ptr + token // PAGE, mask=token < length, other=0) + token % PAGE
    return page, position


@triton.jit
def _walk(
    q, acc, m, l, first, last, length, oldest,
    k_head_ptr, v_head_ptr, table_ptr, positions_ptr, table_width,
    k_stride_p, k_stride_t, v_stride_p, v_stride_t, scale_log2, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to tiles [first, last) of one row."""
    d = tl.arange(0, D)
    n = tl.arange(0, N)
    ONE_PAGE: tl.constexpr = PAGE % N == 0
    page, position = _locate(table_ptr, positions_ptr, first, length, table_width, N, PAGE)
    for tile in tl.range(first, last, num_stages=STAGES):
        seen = tile * N + n < length  # [N]
        if ONE_PAGE:
            slot = (tile * N) % PAGE
            k_tile_ptr = k_head_ptr + page.to(tl.int64) * k_stride_p + slot.to(tl.int64) * k_stride_t
            v_tile_ptr = v_head_ptr + page.to(tl.int64) * v_stride_p + slot.to(tl.int64) * v_stride_t
            k_ptrs = k_tile_ptr + n[:, None] * k_stride_t + d[None, :]  # [N, D]
            v_ptrs = v_tile_ptr + n[:, None] * v_stride_t + d[None, :]
            if WINDOWED:
                seen = seen & (position + n >= oldest)
        else:
            pages, slots = page.to(tl.int64), ((tile * N + n) % PAGE).to(tl.int64)  # [N]
            k_ptrs = k_head_ptr + (pages * k_stride_p + slots * k_stride_t)[:, None] + d[None, :]
            v_ptrs = v_head_ptr + (pages * v_stride_p + slots * v_stride_t)[:, None] + d[None, :]
            if WINDOWED:
                seen = seen & (position >= oldest)
        # A recycled page may hold NaN beyond its tokens, and 0 * NaN is NaN: V is masked as well as the logits.
        if MASKED:
            read = seen[:, None] & (d[None, :] < HEAD_DIM)
            k = tl.load(k_ptrs, mask=read, other=0.0, eviction_policy="evict_first")
            v = tl.load(v_ptrs, mask=read, other=0.0, eviction_policy="evict_first")
        elif D != HEAD_DIM:
            k = tl.load(k_ptrs, mask=d[None, :] < HEAD_DIM, other=0.0, eviction_policy="evict_first")
            v = tl.load(v_ptrs, mask=d[None, :] < HEAD_DIM, other=0.0, eviction_policy="evict_first")
        else:
            k = tl.load(k_ptrs, eviction_policy="evict_first")
            v = tl.load(v_ptrs, eviction_policy="evict_first")
        # One tile ahead: the next tile's addresses are there when its loads are issued, and the pipeliner sees no load that
        # depends on a load (it would spend a stage on it and keep one tile less in flight).
        page, position = _locate(table_ptr, positions_ptr, tile + 1, length, table_width, N, PAGE)
        acc, m, l = online_softmax(q, k, v, acc, m, l, seen[None, :], scale_log2, softcap, MASKED, UPCAST)
    return acc, m, l


@triton.jit
def _holder(item, total, parts):
    """schedule.holder."""
    base, extra = total // parts, total % parts
    longer = extra * (base + 1)
    # base is 0 only where every item is in a longer run.
    return tl.where(item < longer, item // (base + 1), extra + (item - longer) // tl.maximum(base, 1))


@triton.jit
def _store_piece(
    sums_ptr, stats_ptr, slot, acc, m, l, M: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    g, d = tl.arange(0, M), tl.arange(0, D)
    slot = slot.to(tl.int64)
    inside = (g[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    tl.store(sums_ptr + (slot * GROUP + g[:, None]) * HEAD_DIM + d[None, :], acc, mask=inside)
    tl.store(stats_ptr + slot * 2 * GROUP + g, m, mask=g < GROUP)
    tl.store(stats_ptr + slot * 2 * GROUP + GROUP + g, l, mask=g < GROUP)


@triton.jit
def _merge_pieces(
    sums_ptr, stats_ptr, row_cta, leader, count, step,
    S: tl.constexpr, M: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sum `count` pieces of a row, from number `leader` on in steps of `step`, in that order: acc [M, D], m and l [M]."""
    g, d, s = tl.arange(0, M), tl.arange(0, D), tl.arange(0, S)
    acc = tl.zeros((M, D), tl.float32)
    m = tl.full((M,), float("-inf"), tl.float32)
    l = tl.zeros((M,), tl.float32)
    for start in range(0, count, S):
        piece = leader + (start + s) * step  # [S]
        listed = start + s < count
        # A row's first piece lies in its CTA's second slot: see schedule.py.
        slot = (2 * (row_cta + piece) + tl.where(piece == 0, 1, 0)).to(tl.int64)
        stats = slot[:, None] * 2 * GROUP + g[None, :]  # [S, M]
        there = listed[:, None] & (g[None, :] < GROUP)
        m_s = tl.load(stats_ptr + stats, mask=there, other=float("-inf"), cache_modifier=".cg")
        l_s = tl.load(stats_ptr + stats + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        sums = (slot[:, None, None] * GROUP + g[None, :, None]) * HEAD_DIM + d[None, None, :]  # [S, M, D]
        inside = there[:, :, None] & (d[None, None, :] < HEAD_DIM)
        acc_s = tl.load(sums_ptr + sums, mask=inside, other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(m_s, axis=0))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(m_s - top[None, :])  # [S, M]
        decay = tl.exp2(m - top)
        l = l * decay + tl.sum(l_s * weight, axis=0)
        acc = acc * decay[:, None] + tl.sum(acc_s * weight[:, :, None], axis=0)
        m = m_new
    return acc, m, l


@triton.jit
def _write_row(
    out_ptr, lse_ptr, sinks_ptr, v_scale_ptr, sequence, kv_head, kv_heads, acc, m, l,
    M: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The final state of a row: normalise, add the sinks, change to natural log."""
    g, d = tl.arange(0, M), tl.arange(0, D)
    inside = g < GROUP
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + kv_head * GROUP + g, mask=inside, other=float("-inf")) * LOG2E
        m_new = tl.maximum(m, sink)
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay = tl.exp2(m - top)
        l = l * decay + tl.exp2(sink - top)
        acc = acc * decay[:, None]
        m = m_new
    out = acc / tl.where(l > 0, l, 1.0)[:, None]
    if v_scale_ptr is not None:
        out *= tl.load(v_scale_ptr)
    lse = tl.where(l > 0, (m + tl.log2(tl.where(l > 0, l, 1.0))) * LN2, float("-inf"))
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
    UPCAST: tl.constexpr, STAGES: tl.constexpr,
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
        l = tl.zeros((M_DOT,), tl.float32)
        k_head_ptr = k_ptr + kv_head.to(tl.int64) * k_stride_h
        v_head_ptr = v_ptr + kv_head.to(tl.int64) * v_stride_h
        row_table_ptr = table_ptr + wide * table_stride
        row_positions_ptr = None if positions_ptr is None else positions_ptr + wide * positions_stride
        # Tiles inside `length` need no mask; with a window, any tile may.
        masked_from = origin + first
        if window is None:
            full = tl.maximum(tl.minimum(origin + last, length // N), origin + first)
            acc, m, l = _walk(
                q, acc, m, l, origin + first, full, length, oldest,
                k_head_ptr, v_head_ptr, row_table_ptr, row_positions_ptr, table_width,
                k_stride_p, k_stride_t, v_stride_p, v_stride_t, scale_log2, softcap,
                HEAD_DIM, D, N, PAGE, False, False, UPCAST, STAGES,
            )  # fmt: skip
            masked_from = full
        acc, m, l = _walk(
            q, acc, m, l, masked_from, origin + last, length, oldest,
            k_head_ptr, v_head_ptr, row_table_ptr, row_positions_ptr, table_width,
            k_stride_p, k_stride_t, v_stride_p, v_stride_t, scale_log2, softcap,
            HEAD_DIM, D, N, PAGE, True, window is not None, UPCAST, STAGES if window is not None else 1,
        )  # fmt: skip

        if last - first == tiles:
            _write_row(
                out_ptr, lse_ptr, sinks_ptr, v_scale_ptr, sequence, kv_head, kv_heads, acc, m, l,
                M_DOT, D, GROUP, HEAD_DIM,
            )  # fmt: skip
        else:
            row_part = _holder(row_begin - line_start, total, parts)
            pieces = _holder(row_begin - line_start + tiles - 1, total, parts) - row_part + 1
            row_cta = row_part + cta - part
            piece = cta - row_cta
            _store_piece(
                sums_ptr, stats_ptr, 2 * cta + tl.where(piece == 0, 1, 0), acc, m, l, M_DOT, D, GROUP, HEAD_DIM
            )
            # schedule.merge_groups
            width = tl.full((), FAN_IN, tl.int32)
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
                    sum_acc, sum_m, sum_l = _merge_pieces(
                        sums_ptr, stats_ptr, row_cta, leader, count, step, S, M_MERGE, D, GROUP, HEAD_DIM
                    )
                    tl.store(level_ptr + leader, 0)
                    if step * width >= pieces:
                        _write_row(
                            out_ptr, lse_ptr, sinks_ptr, v_scale_ptr, sequence, kv_head, kv_heads, sum_acc, sum_m, sum_l,
                            M_MERGE, D, GROUP, HEAD_DIM,
                        )  # fmt: skip
                    else:
                        # The group's sum takes its first piece's place, once every thread has read that.
                        tl.debug_barrier()
                        slot = 2 * (row_cta + leader) + tl.where(leader == 0, 1, 0)
                        _store_piece(sums_ptr, stats_ptr, slot, sum_acc, sum_m, sum_l, M_MERGE, D, GROUP, HEAD_DIM)
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
    head_dim: int, group: int, *, tile: int, page_tokens: int, num_stages: int, fan_in: int, fixed_split: int = 0
) -> dict[str, int | bool]:
    """The constexpr arguments of `decode_kernel`; `page_tokens` 0 or a multiple of `tile` keeps a tile within one page."""
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
            f"the plan is for (sequences, query heads, KV heads, head dim, page tokens) {planned}, the call has {given}; "
            "make a plan for each shape"
        )
    if q.stride(2) != 1:
        q = q.contiguous()
    out = torch.empty((B, H, D), dtype=out_dtype, device=q.device)
    lse = torch.empty((B, H), dtype=torch.float32, device=q.device)
    if B == 0:
        return AttentionState(out, lse)
    table_width = kv.page_table.shape[1]
    # With one page to a sequence no tile crosses a page border, whatever the page's size.
    page_tokens = 1 << 30 if table_width == 1 else kv.page_tokens
    decode_kernel[(plan.num_ctas,)](
        q, kv.k, kv.v, kv.page_table, kv.page_positions if window is not None else None, kv.lengths,
        q_positions if window is not None else None, sinks, kv.k_scale, kv.v_scale,
        plan.work, plan.scratch, out, lse,
        scale / softcap * LOG2E.value if softcap else scale * LOG2E.value, softcap, window,
        B, kv.num_kv_heads, plan.num_ctas, table_width, kv.page_table.stride(0),
        0 if kv.page_positions is None else kv.page_positions.stride(0),
        q.stride(0), q.stride(1), *kv.k.stride()[:3], *kv.v.stride()[:3],
        **decode_constants(
            D, plan.group, tile=plan.tile, page_tokens=page_tokens, num_stages=plan.num_stages, fan_in=plan.fan_in,
            fixed_split=plan.fixed_split,
        ),
        num_warps=plan.num_warps, num_stages=plan.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return AttentionState(out, lse)
