"""The operators in PyTorch, for any device: the production path on the CPU.

Keys and values are read once, tile by tile, and attended to by all queries of a GQA group together; each tile leaves a
state, and states are merged. Nothing is padded to the longest sequence.

Shapes: B sequences, N query tokens, H query heads, K KV heads, G = H / K, D head dim, R tiles of a group, S tokens of a
tile.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lean_attention import kv_tiles
from lean_attention.kv_tiles import KvTiles, Tile, TileReader, blank_unseen, cut_tiles
from lean_attention.paged_kv import PagedKV
from lean_attention.state import AttentionState, merge_in_torch
from lean_attention.tile_attention import NO_KEY, SCORE_ELEMENTS, attend, attend_to_one, native_dtype


def plan_decode(kv: PagedKV, *, window: int | None, q_positions: Tensor | None) -> KvTiles:
    """The tiles of one decode step."""
    first_seen = None
    if window is not None:
        newest = (kv.lengths - 1 if q_positions is None else q_positions).long()
        first_seen = newest - window + 1
    copied = native_dtype(kv.k) != kv.k.dtype
    small, long = kv_tiles.TILE_ELEMENTS, kv_tiles.LONG_TILE_ELEMENTS
    return cut_tiles(kv, first_seen, tile_elements=small, page_elements=small if copied else long, in_place=not copied)


def decode(
    q: Tensor,
    kv: PagedKV,
    plan: KvTiles,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    out_dtype: torch.dtype,
) -> AttentionState:
    """`lean_attention.lean_decode`, unchecked; a window is in the plan already."""
    B, H, D = q.shape
    K = kv.num_kv_heads
    dtype = native_dtype(kv.k)
    q_BKG1D = q.to(dtype).contiguous().view(B, K, H // K, 1, D)
    num_tiles = plan.table.shape[0]
    lse = torch.empty(num_tiles, K, H // K, device=q.device)
    out = torch.empty(num_tiles, K, H // K, D, device=q.device)
    k_reader, v_reader = TileReader(kv.k, plan, dtype), TileReader(kv.v, plan, dtype)
    qk_scale = _scale(kv, scale)
    for group in plan.groups():
        rows, tiles = [row for row, _ in group], [tile for _, tile in group]
        k_RKSD, v_RKSD = k_reader.read(tiles), v_reader.read(tiles)
        bias = None
        if len(tiles) > 1 and any(tile.tokens != k_RKSD.shape[2] for tile in tiles):
            blank_unseen(k_RKSD, tiles)
            blank_unseen(v_RKSD, tiles)
            bias = _seen_tokens(tiles, k_RKSD)
        if len(tiles) == 1:
            where, sequence = slice(rows[0], rows[0] + 1), tiles[0].sequence
            state = attend_to_one(q_BKG1D[sequence : sequence + 1], k_RKSD, v_RKSD, scale=qk_scale, softcap=softcap)
        else:
            where, queries = rows, q_BKG1D[[tile.sequence for tile in tiles]]
            state = attend(queries, k_RKSD, v_RKSD, scale=qk_scale, softcap=softcap, bias_BNS=bias)
        out[where], lse[where] = (x.squeeze(3).float() for x in state)
    out, lse = _merge_tiles(plan.table[:, Tile._fields.index("sequence")].to(q.device), out, lse, B)
    if kv.v_scale is not None:
        out *= kv.v_scale
    state = _with_sinks(AttentionState(out.view(B, H, D), lse.view(B, H)), sinks)
    return AttentionState(state.out.to(out_dtype), state.lse)


def _seen_tokens(tiles: list[Tile], k_RKSD: Tensor) -> Tensor:
    """A bias [R, 1, S] of 0 for the tokens of each tile and -inf for its padding."""
    token_S = torch.arange(k_RKSD.shape[2], device=k_RKSD.device)
    skip_R1, tokens_R1 = torch.tensor([(t.skip, t.tokens) for t in tiles], device=k_RKSD.device).T.unsqueeze(-1)
    seen_RS = (token_S >= skip_R1) & (token_S < skip_R1 + tokens_R1)
    return torch.where(seen_RS, 0.0, NO_KEY).unsqueeze(1)


def _merge_tiles(sequence_of: Tensor, out: Tensor, lse: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Merge the tiles [tiles, K, G, D] and [tiles, K, G] of each sequence: out [B, K, G, D] and lse [B, K, G]."""
    if torch.equal(sequence_of, torch.arange(B, device=out.device)):
        return out, lse
    index = sequence_of[:, None, None].expand_as(lse)
    largest = lse.new_full((B, *lse.shape[1:]), NO_KEY).scatter_reduce_(0, index, lse, "amax")
    weight = torch.exp(lse - largest[sequence_of])
    sums = torch.zeros_like(largest).index_add_(0, sequence_of, weight)
    weighted = out.new_zeros(B, *out.shape[1:]).index_add_(0, sequence_of, out * weight[..., None])
    # Without a key the sum is 0 and its log -inf; a seen key makes it at least 1.
    return weighted / sums.clamp_min(1.0)[..., None], largest + sums.log()


def prefill(
    q: Tensor,
    kv: PagedKV,
    q_offsets: Tensor,
    q_positions: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> AttentionState:
    """`lean_attention.lean_prefill`, unchecked, with a float32 out."""
    N = q.shape[0]
    state = AttentionState.identity(q.shape, device=q.device)
    offsets = q_offsets.tolist()
    if not (offsets[0] == 0 and offsets[-1] == N and all(a <= b for a, b in pairwise(offsets))):
        raise ValueError(f"lean_prefill got q_offsets {offsets}; needed: from 0 to {N}, never falling")
    lowest = torch.zeros(kv.num_sequences, dtype=torch.int64)
    highest = torch.full_like(lowest, -1)
    positions = q_positions.long().cpu()
    for b, (begin, end) in enumerate(pairwise(offsets)):
        if begin < end:
            lowest[b], highest[b] = positions[begin:end].aminmax()
    first_seen = None if window is None else lowest - window + 1
    elements = kv_tiles.LONG_TILE_ELEMENTS
    plan = cut_tiles(kv, first_seen, highest, tile_elements=elements, page_elements=elements)
    dtype = native_dtype(kv.k)
    queries = q.to(dtype).contiguous()
    k_reader, v_reader = TileReader(kv.k, plan, dtype), TileReader(kv.v, plan, dtype)
    for fields in plan.table.tolist():
        tile = Tile(*fields)
        rows = slice(offsets[tile.sequence], offsets[tile.sequence + 1])
        _prefill_tile(
            AttentionState(state.out[rows], state.lse[rows]), queries[rows], positions[rows],
            k_reader.read([tile]), v_reader.read([tile]), _positions(kv, plan, tile), _scale(kv, scale), window,
            softcap,
        )  # fmt: skip
    if kv.v_scale is not None:
        state.out.mul_(kv.v_scale)
    return _with_sinks(state, sinks)


def _prefill_tile(
    state: AttentionState,
    q_NHD: Tensor,
    queries_N: Tensor,
    k_1KSD: Tensor,
    v_1KSD: Tensor,
    keys_S: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Let the keys of a tile, at positions keys_S, join the state of one sequence's queries, at positions queries_N."""
    N, H, D = q_NHD.shape
    K, S = k_1KSD.shape[1:3]
    q_1KGND = q_NHD.view(N, K, H // K, D).permute(1, 2, 0, 3)[None]

    def join(rows: slice, keys: slice, bias_NS: Tensor | None = None, *, causal: bool = False) -> None:
        out, lse = attend(
            q_1KGND[:, :, :, rows], k_1KSD[:, :, keys], v_1KSD[:, :, keys], scale=scale, softcap=softcap,
            bias_BNS=None if bias_NS is None else bias_NS[None], causal=causal,
        )  # fmt: skip
        mine = AttentionState(state.out[rows].unflatten(1, (K, H // K)), state.lse[rows].unflatten(1, (K, H // K)))
        _join(mine, out[0].permute(2, 0, 1, 3), lse[0].permute(2, 0, 1))

    # First the keys that come before every query.
    start = 0
    if window is None:
        later = (keys_S > queries_N.min()).nonzero()
        start = int(later[0]) if later.numel() else S
        if start > 0:
            join(slice(0, N), slice(0, start))
        if start == S:
            return
    if window is None and _rises_by_one(queries_N) and _rises_by_one(keys_S[start:]):
        # A triangle: the query at the position of key `start` sees that one, the next query one more.
        first = int(keys_S[start] - queries_N[0])
        if first < N:
            join(slice(first, N), slice(start, start + N - first), causal=True)
        return
    block = max(1, SCORE_ELEMENTS // (S - start))
    for begin in range(0, N, block):
        rows = slice(begin, begin + block)
        keys, bias_NS = _visible_keys(keys_S[start:], queries_N[rows], window)
        if keys.start < keys.stop:
            bias_NS = None if bias_NS is None else bias_NS.to(q_NHD.device)
            join(rows, slice(start + keys.start, start + keys.stop), bias_NS)


def _rises_by_one(positions: Tensor) -> bool:
    return bool((positions.diff() == 1).all())


def _join(state: AttentionState, out: Tensor, lse: Tensor) -> None:
    """Merge a state of other keys into `state`, in place."""
    if not (state.lse > NO_KEY).any():
        state.out.copy_(out)
        state.lse.copy_(lse)
        return
    merged = torch.logaddexp(state.lse, lse)
    # Without a key in either, -inf - -inf would be NaN.
    reachable = merged.masked_fill(merged == NO_KEY, 0.0)
    state.out.mul_((state.lse - reachable).exp_().unsqueeze(-1))
    state.out.addcmul_(out.float(), (lse - reachable).exp_().unsqueeze(-1))
    state.lse.copy_(merged)


def _visible_keys(keys_S: Tensor, queries_N: Tensor, window: int | None) -> tuple[slice, Tensor | None]:
    """The run of keys (by position) that the queries see, and a bias [N, run] of 0 and -inf; None if all see all."""
    seen_NS = keys_S <= queries_N[:, None]
    if window is not None:
        seen_NS &= keys_S > queries_N[:, None] - window
    seen = seen_NS.any(dim=0).nonzero()
    if seen.numel() == 0:
        return slice(0, 0), None
    run = slice(int(seen[0]), int(seen[-1]) + 1)
    seen_NS = seen_NS[:, run]
    return run, None if seen_NS.all() else torch.where(seen_NS, 0.0, NO_KEY)


def _positions(kv: PagedKV, plan: KvTiles, tile: Tile) -> Tensor:
    """Absolute positions [S] of a tile's tokens, on the CPU."""
    first = plan.positions[tile.first : tile.first + tile.num_pages, None]
    return (first + torch.arange(kv.page_tokens)).flatten()[tile.skip : tile.skip + tile.tokens]


def _scale(kv: PagedKV, scale: float) -> float:
    """Everything that multiplies q . k."""
    return scale if kv.k_scale is None else scale * float(kv.k_scale)


def _with_sinks(state: AttentionState, sinks_H: Tensor | None) -> AttentionState:
    """Let sinks join: each is a key whose value is 0, so its state is (0, sink)."""
    if sinks_H is None:
        return state
    out = torch.stack((state.out, torch.zeros_like(state.out)))
    return merge_in_torch(out, torch.stack((state.lse, sinks_H.expand_as(state.lse))))
