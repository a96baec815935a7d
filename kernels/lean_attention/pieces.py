"""Device code for the pieces of a row that several CTAs share: find them, store them, merge them.

Where a piece lies is arithmetic, see schedule.py. Sums are in base 2 and not normalised, see tile_walk.py.

Shapes: M query heads of a group (padded), D head dim (padded), S pieces, G CTAs.
"""

import triton
import triton.language as tl


@triton.jit
def holder(item, total, parts):
    """`schedule.holder`: which of `parts` equal runs of `total` items holds the item."""
    base, extra = total // parts, total % parts
    longer = extra * (base + 1)
    # base is 0 only where every item is in a longer run.
    return tl.where(item < longer, item // (base + 1), extra + (item - longer) // tl.maximum(base, 1))


@triton.jit
def store_piece(
    sums_ptr, stats_ptr, slot, acc, m, den,
    M: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Leave sums acc [M, D], maxima m [M] and denominators den [M] in a slot of the scratch memory."""
    g, d = tl.arange(0, M), tl.arange(0, D)
    slot = slot.to(tl.int64)
    inside = (g[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    tl.store(sums_ptr + (slot * GROUP + g[:, None]) * HEAD_DIM + d[None, :], acc, mask=inside)
    tl.store(stats_ptr + slot * 2 * GROUP + g, m, mask=g < GROUP)
    tl.store(stats_ptr + slot * 2 * GROUP + GROUP + g, den, mask=g < GROUP)


@triton.jit
def merge_pieces(
    sums_ptr, stats_ptr, row_cta, leader, count, step,
    S: tl.constexpr, M: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sum pieces leader, leader + step, ... (`count` of them) of a row, in that order: acc [M, D], m and den [M]."""
    g, d, s = tl.arange(0, M), tl.arange(0, D), tl.arange(0, S)
    acc = tl.zeros((M, D), tl.float32)
    m = tl.full((M,), float("-inf"), tl.float32)
    den = tl.zeros((M,), tl.float32)
    for start in range(0, count, S):
        piece = leader + (start + s) * step  # [S]
        listed = start + s < count
        # A row's first piece lies in its CTA's second slot: see schedule.py.
        slot = (2 * (row_cta + piece) + tl.where(piece == 0, 1, 0)).to(tl.int64)
        stats = slot[:, None] * 2 * GROUP + g[None, :]  # [S, M]
        there = listed[:, None] & (g[None, :] < GROUP)
        m_s = tl.load(stats_ptr + stats, mask=there, other=float("-inf"), cache_modifier=".cg")
        den_s = tl.load(stats_ptr + stats + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        sums = (slot[:, None, None] * GROUP + g[None, :, None]) * HEAD_DIM + d[None, None, :]  # [S, M, D]
        inside = there[:, :, None] & (d[None, None, :] < HEAD_DIM)
        acc_s = tl.load(sums_ptr + sums, mask=inside, other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(m_s, axis=0))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(m_s - top[None, :])  # [S, M]
        decay = tl.exp2(m - top)
        den = den * decay + tl.sum(den_s * weight, axis=0)
        acc = acc * decay[:, None] + tl.sum(acc_s * weight[:, :, None], axis=0)
        m = m_new
    return acc, m, den
