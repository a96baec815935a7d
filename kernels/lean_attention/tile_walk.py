"""Device code that decode and prefill share: walk the tiles of one row of paged keys with an online softmax.

Logits are in base 2 inside: m is the largest logit times log2(e), and `finish` changes to natural log.

Shapes: M query rows, N tokens of a tile, D head dim padded to a power of two, T tokens of a page.
"""

# Triton's kernel language is not Python's to a type checker.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q, k, v, acc, m, den, seen, scale_log2, softcap,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: q [M, D], k and v [N, D], sums acc [M, D], maxima m [M], denominators den [M], seen [1 or M, N]."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
    if softcap is not None:
        # scale_log2 holds 1 / softcap: logits are x log2(e) with x = s / softcap, and tanh(x) = 1 - 2 / (exp(2x) + 1).
        logits = (1.0 - 2.0 / (tl.exp2(2.0 * logits) + 1.0)) * (softcap * LOG2E)
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    m_new = tl.maximum(m, tl.max(logits, axis=1))
    # Where nothing has been seen yet, -inf - -inf would be NaN.
    top = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(logits - top[:, None])  # [M, N]
    decay = tl.exp2(m - top)
    den = den * decay + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, m_new, den


@triton.jit
def _pages(table_ptr, tile, length, table_width, N: tl.constexpr, PAGE: tl.constexpr):
    """A tile's page; where a tile spans pages, the page of each token [N]."""
    if PAGE % N == 0:
        page = tl.load(table_ptr + tl.minimum(tile * N // PAGE, table_width - 1))
    else:
        token = tile * N + tl.arange(0, N)
        page = tl.load(table_ptr + token // PAGE, mask=token < length, other=0)
    return page


@triton.jit
def _positions(positions_ptr, tile, length, N: tl.constexpr, PAGE: tl.constexpr):
    """The absolute positions [N] of a tile's tokens."""
    token = tile * N + tl.arange(0, N)
    if positions_ptr is None:
        position = token
    elif PAGE % N == 0:
        position = tl.load(positions_ptr + tile * N // PAGE) + token % PAGE
    else:
        position = tl.load(positions_ptr + token // PAGE, mask=token < length, other=0) + token % PAGE
    return position


@triton.jit
def walk(
    q, acc, m, den, first, last, length, newest, oldest, horizon,
    k_head_ptr, v_head_ptr, table_ptr, positions_ptr, table_width,
    k_stride_p, k_stride_t, v_stride_p, v_stride_t, scale_log2, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to tiles [first, last) of a sequence of `length` tokens.

    MASKED leaves out tokens from `length` on; CAUSAL those at positions beyond `newest`, WINDOWED those before `oldest`
    (both scalars or [M, 1]) and takes no position before `horizon` to hold numbers.
    """
    d = tl.arange(0, D)
    n = tl.arange(0, N)
    ONE_PAGE: tl.constexpr = PAGE % N == 0
    if UPCAST:
        # Triton 3.9's interpreter multiplies the bit patterns of bfloat16.
        q = q.to(tl.float32)
    page = _pages(table_ptr, first, length, table_width, N, PAGE)
    for tile in tl.range(first, last, num_stages=STAGES):
        token = tile * N + n  # [N]
        if WINDOWED:
            # A page that has left the window may be unlisted by a negative id; what it yields is masked.
            page = tl.maximum(page, 0)
        if ONE_PAGE:
            slot = (tile * N) % PAGE
            k_tile_ptr = k_head_ptr + page.to(tl.int64) * k_stride_p + slot.to(tl.int64) * k_stride_t
            v_tile_ptr = v_head_ptr + page.to(tl.int64) * v_stride_p + slot.to(tl.int64) * v_stride_t
            k_ptrs = k_tile_ptr + n[:, None] * k_stride_t + d[None, :]  # [N, D]
            v_ptrs = v_tile_ptr + n[:, None] * v_stride_t + d[None, :]
        else:
            pages, slots = page.to(tl.int64), (token % PAGE).to(tl.int64)  # [N]
            k_ptrs = k_head_ptr + (pages * k_stride_p + slots * k_stride_t)[:, None] + d[None, :]
            v_ptrs = v_head_ptr + (pages * v_stride_p + slots * v_stride_t)[:, None] + d[None, :]
        listed = token < length
        if MASKED:
            # A recycled page may hold NaN beyond its tokens, and 0 * NaN is NaN: V is masked as well as the logits.
            read = listed[:, None] & (d[None, :] < HEAD_DIM)
            k = tl.load(k_ptrs, mask=read, other=0.0, eviction_policy="evict_first")
            v = tl.load(v_ptrs, mask=read, other=0.0, eviction_policy="evict_first")
        elif D != HEAD_DIM:
            k = tl.load(k_ptrs, mask=d[None, :] < HEAD_DIM, other=0.0, eviction_policy="evict_first")
            v = tl.load(v_ptrs, mask=d[None, :] < HEAD_DIM, other=0.0, eviction_policy="evict_first")
        else:
            k = tl.load(k_ptrs, eviction_policy="evict_first")
            v = tl.load(v_ptrs, eviction_policy="evict_first")
        # One tile ahead: the next tile's addresses are there when its loads are issued, and the pipeliner sees no load
        # that depends on a load (it would spend a stage on it and keep one tile less in flight).
        page = _pages(table_ptr, tile + 1, length, table_width, N, PAGE)
        k, v = k.to(q.dtype), v.to(q.dtype)
        seen = listed[None, :]
        # Positions mask what was read, not the reading: loads that waited for them would not be pipelined.
        if CAUSAL or WINDOWED:
            position = _positions(positions_ptr, tile, length, N, PAGE)
            if CAUSAL:
                seen = seen & (position[None, :] <= newest)
            if WINDOWED:
                seen = seen & (position[None, :] >= oldest)
                # What lies before the horizon may be NaN by now, and 0 * NaN is NaN. An integer clears its bits:
                # tl.where with a [N, D] mask of single bits fails to compile in some layouts (Triton 3.9), and a clamp
                # by tl.minimum makes float32 of bfloat16, which then misses the tensor cores (Triton 3.6).
                BITS: tl.constexpr = tl.int16 if v.dtype.primitive_bitwidth == 16 else tl.int32
                kept = tl.where(position >= horizon, -1, 0).to(BITS)  # [N]
                v = (v.to(BITS, bitcast=True) & kept[:, None]).to(v.dtype, bitcast=True)
        acc, m, den = _attend(q, k, v, acc, m, den, seen, scale_log2, softcap, MASKED, PRECISION)
    return acc, m, den


@triton.jit
def finish(acc, m, den, sinks_ptrs, v_scale_ptr, inside):
    """The states of rows [M]: out [M, D], and lse [M] in natural log. A sink is a key whose value is zero."""
    if sinks_ptrs is not None:
        sink = tl.load(sinks_ptrs, mask=inside, other=float("-inf")) * LOG2E
        m_new = tl.maximum(m, sink)
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay = tl.exp2(m - top)
        den = den * decay + tl.exp2(sink - top)
        acc = acc * decay[:, None]
        m = m_new
    some = den > 0
    out = acc * (1.0 / tl.where(some, den, 1.0))[:, None]  # one division a row; of each element, more registers
    if v_scale_ptr is not None:
        out *= tl.load(v_scale_ptr)
    lse = tl.where(some, (m + tl.log2(tl.where(some, den, 1.0))) * LN2, float("-inf"))
    return out, lse
