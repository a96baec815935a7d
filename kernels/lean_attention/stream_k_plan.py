"""Planning a step of stream-K decode on the device: `lean_attention.schedule`, computed by Triton without a
synchronisation.

The plan holds the schedule, and the scratch memory of the launches that follow it. It knows nothing of queries or
values.

Shapes: B sequences, K KV heads, G CTAs of the grid, T tokens of a page.
"""

# Triton's kernel language is not Python's to a type checker.
# pyright: reportCallIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_attention.operators import operator
from lean_attention.paged_kv import PagedKV
from lean_attention.tuning import DecodeTuning, arch_family, check_head_dim, decode_tuning, device_ctas

# The layout of `StreamKPlan.work`, in int32 words: the header (total tiles, active CTAs, empty sequences, unused),
# then the sections whose lengths are named here. The kernels walk the same offsets.
HEADER: tl.constexpr = tl.constexpr(4)


PAGES_AT_ONCE = 1024
SEQUENCES_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class StreamKPlan:
    """One step's tiles dealt to `num_ctas` CTAs, on the device; and the scratch memory that they merge through.

    Launches that share a plan share its scratch: they must follow each other on one stream (as a step's layers do),
    inside a captured graph or outside. Two streams want two plans. A launch leaves the arrival counters at zero, and
    planning zeroes them too, so a plan serves any number of launches, and a captured graph any number of replays.
    """

    work: Tensor
    """int32: header [4] | tiles before each sequence [B + 1] | first tile [B] | empty sequences [B] | each CTA's first
    sequence [G] | arrival counters [2, G]."""

    scratch: Tensor
    """float32: pieces' sums [2G, group, D] | their maxima and denominators [2G, 2, group]."""

    num_sequences: int
    num_kv_heads: int
    group: int
    """Query heads per KV head."""
    head_dim: int
    page_tokens: int

    num_ctas: int
    """G, the grid."""

    fixed_split: int
    """0 for stream-K. S deals every row alone to S CTAs instead, for comparison: G is then B * K * S."""

    tile: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int
    min_tiles: int
    fan_in: int

    @property
    def total_tiles(self) -> Tensor:
        """[] int32."""
        return self.work[0]

    @property
    def active_ctas(self) -> Tensor:
        """[] int32."""
        return self.work[1]

    @property
    def tiles_before(self) -> Tensor:
        """[B + 1] int32: for one KV head, the tiles of all sequences before this one."""
        return self.work[4 : 5 + self.num_sequences]

    @property
    def first_tile(self) -> Tensor:
        """[B] int32: the first tile of each sequence that is dealt."""
        return self.work[5 + self.num_sequences :][: self.num_sequences]

    @property
    def empty_sequences(self) -> Tensor:
        """[B] int32, valid up to header word 2: the sequences without a visible token."""
        return self.work[5 + 2 * self.num_sequences :][: self.num_sequences]

    @property
    def first_sequence(self) -> Tensor:
        """[G] int32, valid up to `active_ctas`: where each CTA's run starts."""
        return self.work[5 + 3 * self.num_sequences :][: self.num_ctas]

    @property
    def counters(self) -> Tensor:
        """[2, G] int32: arrivals at each merge, zero between launches."""
        return self.work[5 + 3 * self.num_sequences + self.num_ctas :].view(2, self.num_ctas)


@triton.jit(do_not_specialize=["window", "positions_stride", "page_tokens"])
def visible_kernel(
    lengths_ptr,
    q_positions_ptr,
    page_positions_ptr,
    visible_ptr,
    window,
    positions_stride,
    page_tokens,
    BLOCK: tl.constexpr,
):
    """schedule.visible_tokens of one sequence whose pages have positions of their own."""
    b = tl.program_id(0)
    length = tl.load(lengths_ptr + b)
    oldest = tl.load(q_positions_ptr + b) - window + 1
    first, end = length, length * 0
    pages = tl.cdiv(length, page_tokens)
    for start in range(0, pages, BLOCK):
        page = start + tl.arange(0, BLOCK)  # [BLOCK]
        listed = page < pages
        begin = tl.where(listed, page, 0) * page_tokens  # beyond the last page the product could wrap around
        position = tl.load(page_positions_ptr + b.to(tl.int64) * positions_stride + page, mask=listed, other=0)
        stop = tl.minimum(begin + page_tokens, length)
        seen = begin + tl.maximum(oldest - position, 0)
        visible = listed & (seen < stop)
        first = tl.minimum(first, tl.min(tl.where(visible, seen, length), axis=0))
        end = tl.maximum(end, tl.max(tl.where(visible, stop, 0), axis=0))
    tl.store(visible_ptr + 2 * b, tl.minimum(first, end))
    tl.store(visible_ptr + 2 * b + 1, end)


@triton.jit(do_not_specialize=["window", "batch", "kv_heads", "num_ctas", "min_tiles", "tile", "search_steps"])
def deal_kernel(
    lengths_ptr,
    q_positions_ptr,
    visible_ptr,
    work_ptr,
    window,
    batch,
    kv_heads,
    num_ctas,
    min_tiles,
    tile,
    search_steps,
    BLOCK: tl.constexpr,
):
    """Everything in `StreamKPlan.work`, by one CTA."""
    before_ptr = work_ptr + HEADER
    first_tile_ptr = before_ptr + batch + 1
    empty_ptr = first_tile_ptr + batch
    sequence_ptr = empty_ptr + batch
    counters_ptr = sequence_ptr + num_ctas

    tiles_so_far, empty_so_far = batch * 0, batch * 0
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = b < batch
        if visible_ptr is not None:
            first = tl.load(visible_ptr + 2 * b, mask=inside, other=0)
            end = tl.load(visible_ptr + 2 * b + 1, mask=inside, other=0)
        else:
            end = tl.load(lengths_ptr + b, mask=inside, other=0)
            first = tl.zeros_like(end)
            if window is not None:
                newest = end - 1
                if q_positions_ptr is not None:
                    newest = tl.load(q_positions_ptr + b, mask=inside, other=0)
                first = tl.minimum(tl.maximum(newest - window + 1, 0), end)
        first_tile = first // tile
        tiles = tl.where(end > first, (end + tile - 1) // tile - first_tile, 0)
        empty = (inside & (tiles == 0)).to(tl.int32)
        tl.store(before_ptr + b, tiles_so_far + tl.cumsum(tiles, axis=0) - tiles, mask=inside)
        tl.store(first_tile_ptr + b, first_tile, mask=inside)
        tl.store(empty_ptr + empty_so_far + tl.cumsum(empty, axis=0) - 1, b, mask=empty == 1)
        tiles_so_far += tl.sum(tiles, axis=0)
        empty_so_far += tl.sum(empty, axis=0)

    total = tiles_so_far * kv_heads
    active = tl.minimum(num_ctas, tl.maximum((total + min_tiles - 1) // min_tiles, 1))
    tl.store(before_ptr + batch, tiles_so_far)
    tl.store(work_ptr, total)
    tl.store(work_ptr + 1, active)
    tl.store(work_ptr + 2, empty_so_far)
    tl.store(work_ptr + 3, 0)
    # The searches below read what other threads of this CTA wrote.
    tl.debug_barrier()

    base, extra = total // active, total % active
    for start in range(0, num_ctas, BLOCK):
        cta = start + tl.arange(0, BLOCK)  # [BLOCK]
        begin = cta * base + tl.minimum(cta, extra)
        # The last sequence whose tiles begin at or before `begin`: an empty one before it begins at the same place.
        low, high = tl.zeros_like(cta), tl.zeros_like(cta) + batch
        for _ in range(search_steps):
            middle = (low + high) // 2
            at_or_before = tl.load(before_ptr + middle) * kv_heads <= begin
            low = tl.where(at_or_before, middle, low)
            high = tl.where(at_or_before, high, middle)
        tl.store(sequence_ptr + cta, low, mask=cta < num_ctas)
        tl.store(counters_ptr + cta, 0, mask=cta < num_ctas)
        tl.store(counters_ptr + num_ctas + cta, 0, mask=cta < num_ctas)


def plan_stream_k(
    kv: PagedKV,
    num_heads: int,
    *,
    window: int | None = None,
    q_positions: Tensor | None = None,
    num_ctas: int | None = None,
    fixed_split: int | None = None,
    tuning: DecodeTuning | None = None,
) -> StreamKPlan:
    """Deal the visible tiles of `kv` to CTAs, in one or two launches and without a synchronisation.

    num_ctas     the grid; default: tuning.ctas_per_sm for each multiprocessor. It does not follow the lengths, so a
                 captured graph that holds both the plan and the launches serves every length.
    fixed_split  split every row evenly among this many CTAs instead (what split-KV kernels do): for comparison.
    tuning       default: `tuning.decode_tuning` for this device, head dim and dtype.

    window and q_positions: as in `lean_attention.plan_decode`. Raises ValueError for a head dim beyond 256.
    """
    B, K, D = kv.num_sequences, kv.num_kv_heads, kv.head_dim
    group = num_heads // K
    check_head_dim("decode", D)
    if tuning is None:
        tuning = decode_tuning(D, kv.k.dtype, arch_family(kv.device))
    if fixed_split is not None:
        num_ctas = max(1, B * K * fixed_split)
    elif num_ctas is None:
        num_ctas = device_ctas(kv.device, tuning.ctas_per_sm)
    work = _deal(
        kv.lengths, kv.page_positions, q_positions, window, kv.page_tokens, K, num_ctas, tuning.min_tiles, tuning.tile
    )
    scratch = torch.empty(2 * num_ctas * group * (D + 2), dtype=torch.float32, device=kv.device)
    return StreamKPlan(
        work, scratch, B, K, group, D, kv.page_tokens, num_ctas, fixed_split or 0,
        tuning.tile, tuning.num_warps, tuning.num_stages, tuning.ctas_per_sm, tuning.min_tiles, tuning.fan_in,
    )  # fmt: skip


def _empty_work(lengths, page_positions, q_positions, window, page_tokens, kv_heads, num_ctas, min_tiles, tile):
    return lengths.new_empty(_work_words(lengths.shape[0], num_ctas))


@operator("lean_attention::deal_tiles", fake=_empty_work)
def _deal(
    lengths: Tensor,
    page_positions: Tensor | None,
    q_positions: Tensor | None,
    window: int | None,
    page_tokens: int,
    kv_heads: int,
    num_ctas: int,
    min_tiles: int,
    tile: int,
) -> Tensor:
    """`StreamKPlan.work`."""
    B = lengths.shape[0]
    work = torch.empty(_work_words(B, num_ctas), dtype=torch.int32, device=lengths.device)
    visible = None
    if window is not None and page_positions is not None:
        assert q_positions is not None, "a window over pages with positions needs the query's own"
        visible = torch.empty(2 * B, dtype=torch.int32, device=lengths.device)
        if B:
            visible_kernel[(B,)](
                lengths, q_positions, page_positions, visible, window, page_positions.stride(0), page_tokens,
                BLOCK=PAGES_AT_ONCE, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    deal_kernel[(1,)](
        lengths, q_positions if visible is None and window is not None else None, visible, work,
        window if visible is None else None, B, kv_heads, num_ctas, min_tiles, tile, B.bit_length(),
        BLOCK=SEQUENCES_AT_ONCE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return work


def _work_words(num_sequences: int, num_ctas: int) -> int:
    return 5 + 3 * num_sequences + 3 * num_ctas
