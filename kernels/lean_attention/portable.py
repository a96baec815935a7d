"""The operators in PyTorch, for any device: the production path on the CPU.

Keys and values are read once, tile by tile, as float32, and multiplied with the GQA group's queries folded into rows;
tiles leave partial softmax sums that are added up at the end. Nothing is padded to the longest sequence.

Shapes: B sequences, N query tokens, H query heads, K KV heads, G = H / K, D head dim, R tiles of a group, S tokens of a
tile.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lean_attention.kv_tiles import KvTiles, Tile, TileReader, cut_tiles, fill_unseen
from lean_attention.paged_kv import PagedKV
from lean_attention.state import AttentionState, merge_in_torch

NO_KEY = float("-inf")
PREFILL_TILE_TOKENS = 1024
SCORE_ELEMENTS = 1 << 20
"""K * G * queries * S of one block of prefill scores: 4 MB of float32."""


def plan_decode(kv: PagedKV, *, window: int | None, q_positions: Tensor | None) -> KvTiles:
    """The tiles of one decode step."""
    if window is None:
        return cut_tiles(kv)
    newest = (kv.lengths - 1 if q_positions is None else q_positions).long()
    return cut_tiles(kv, first_seen=newest - window + 1)


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
    q_BKGD = _scaled_queries(q, kv, scale).view(B, K, H // K, D)
    num_tiles = plan.table.shape[0]
    peak = q_BKGD.new_empty(num_tiles, K, H // K)
    total = torch.empty_like(peak)
    mean = q_BKGD.new_empty(num_tiles, K, H // K, D)
    reader = TileReader(kv, plan)
    for group in plan.groups():
        rows, tiles = [row for row, _ in group], [tile for _, tile in group]
        queries = q_BKGD[tiles[0].sequence][None] if len(tiles) == 1 else q_BKGD[[tile.sequence for tile in tiles]]
        parts = _attend_to_tiles(queries, kv, reader, tiles, softcap)
        where = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows
        peak[where], total[where], mean[where] = parts
    out, lse = _add_up(plan.table[:, Tile._fields.index("sequence")].to(q.device), peak, total, mean, B)
    if kv.v_scale is not None:
        out *= kv.v_scale
    state = _with_sinks(AttentionState(out.view(B, H, D), lse.view(B, H)), sinks)
    return AttentionState(state.out.to(out_dtype), state.lse)


def _attend_to_tiles(
    q_RKGD: Tensor, kv: PagedKV, reader: TileReader, tiles: list[Tile], softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One group of tiles: the largest logit [R, K, G], the sum of exp(logit - largest), and the same sum of values."""
    R, K, G, D = q_RKGD.shape
    k_RKSD = reader.read(kv.k, tiles)
    S = k_RKSD.shape[2]
    # Keys on the left: twice as fast as queries on the left, where G is small.
    scores_SG = torch.bmm(k_RKSD.reshape(R * K, S, D), q_RKGD.reshape(R * K, G, D).transpose(1, 2)).view(R, K, S, G)
    if softcap is not None:
        scores_SG.div_(softcap).tanh_().mul_(softcap)
    fill_unseen(scores_SG, tiles, NO_KEY)
    scores = scores_SG.transpose(2, 3).contiguous()
    peak = scores.amax(dim=-1)
    weights = scores.sub_(peak[..., None]).exp_()
    v_RKSD = reader.read(kv.v, tiles)
    # Unwritten slots may hold NaN, and 0 * NaN is NaN.
    fill_unseen(v_RKSD, tiles, 0.0)
    values = torch.bmm(weights.view(R * K, G, S), v_RKSD.reshape(R * K, S, D)).view(R, K, G, D)
    return peak, weights.sum(dim=-1), values


def _add_up(sequence_of: Tensor, peak: Tensor, total: Tensor, values: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Add up the tiles of each sequence: out [B, K, G, D] and lse [B, K, G]."""
    K, G = peak.shape[1:]
    index = sequence_of[:, None, None].expand_as(peak)
    largest = peak.new_full((B, K, G), NO_KEY).scatter_reduce_(0, index, peak, "amax")
    rescale = torch.exp(peak - largest[sequence_of])
    sums = peak.new_zeros(B, K, G).index_add_(0, sequence_of, total * rescale)
    out = values.new_zeros(B, *values.shape[1:]).index_add_(0, sequence_of, values * rescale[..., None])
    # Without a key the sum is 0 and its log -inf; a seen key makes it at least 1.
    return out / sums.clamp_min(1.0)[..., None], largest + sums.log()


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
    plan = cut_tiles(kv, first_seen, highest, max_tokens=PREFILL_TILE_TOKENS)
    queries = _scaled_queries(q, kv, scale)
    tiles_of: list[list[Tile]] = [[] for _ in range(kv.num_sequences)]
    for fields in plan.table.tolist():
        tile = Tile(*fields)
        tiles_of[tile.sequence].append(tile)
    for b, (begin, end) in enumerate(pairwise(offsets)):
        if tiles_of[b]:
            _prefill_sequence(
                AttentionState(state.out[begin:end], state.lse[begin:end]),
                queries[begin:end], positions[begin:end], kv, plan, tiles_of[b], window, softcap,
            )  # fmt: skip
    if kv.v_scale is not None:
        state.out.mul_(kv.v_scale)
    return _with_sinks(state, sinks)


def _prefill_sequence(
    state: AttentionState,
    q_NHD: Tensor,
    positions_N: Tensor,
    kv: PagedKV,
    plan: KvTiles,
    tiles: list[Tile],
    window: int | None,
    softcap: float | None,
) -> None:
    """Fill `state` for one sequence's queries, tile by tile, each against blocks of queries."""
    N, H, D = q_NHD.shape
    K = kv.num_kv_heads
    G = H // K
    q_KGND = q_NHD.view(N, K, G, D).permute(1, 2, 0, 3).contiguous()
    peak = q_KGND.new_full((K, G, N), NO_KEY)
    total = q_KGND.new_zeros(K, G, N)
    values = q_KGND.new_zeros(K, G, N, D)
    k_reader, v_reader = TileReader(kv, plan), TileReader(kv, plan)
    for tile in tiles:
        k_KSD, v_KSD = k_reader.read(kv.k, [tile])[0], v_reader.read(kv.v, [tile])[0]
        key_positions = _positions(kv, plan, tile)
        block = max(1, SCORE_ELEMENTS // (H * tile.tokens))
        for begin in range(0, N, block):
            rows = slice(begin, begin + block)
            keys, bias_NS = _visible_keys(key_positions, positions_N[rows], window)
            if keys.start == keys.stop:
                continue
            n, S = positions_N[rows].shape[0], keys.stop - keys.start
            queries = q_KGND[:, :, rows].reshape(K, G * n, D)
            scores = torch.bmm(queries, k_KSD[:, keys].transpose(1, 2)).view(K, G, n, S)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            if bias_NS is not None:
                scores += bias_NS.to(scores.device)
            old = peak[:, :, rows]
            new = torch.maximum(old, scores.amax(dim=-1))
            # A query that has seen no key yet has -inf here, and -inf - -inf would be NaN.
            reachable = new.masked_fill(new == NO_KEY, 0.0)
            weights = scores.sub_(reachable[..., None]).exp_()
            rescale = torch.exp(old - reachable)
            peak[:, :, rows] = new
            total[:, :, rows] = total[:, :, rows] * rescale + weights.sum(dim=-1)
            gained = torch.bmm(weights.view(K, G * n, S), v_KSD[:, keys]).view(K, G, n, D)
            values[:, :, rows] = values[:, :, rows] * rescale[..., None] + gained
    out = values / total.masked_fill(total == 0, 1.0)[..., None]
    state.out.copy_(out.permute(2, 0, 1, 3).reshape(N, H, D))
    state.lse.copy_((peak + total.log()).permute(2, 0, 1).reshape(N, H))


def _visible_keys(keys_S: Tensor, queries_N: Tensor, window: int | None) -> tuple[slice, Tensor | None]:
    """The run of keys (by position) that the queries see, and a bias [N, run] of 0 and -inf; None if all see all."""
    seen_NS = keys_S <= queries_N[:, None]
    if window is not None:
        seen_NS &= keys_S > queries_N[:, None] - window
    if seen_NS.all():
        return slice(0, keys_S.shape[0]), None
    seen = seen_NS.any(dim=0).nonzero()
    if seen.numel() == 0:
        return slice(0, 0), None
    run = slice(int(seen[0]), int(seen[-1]) + 1)
    return run, torch.where(seen_NS[:, run], 0.0, NO_KEY)


def _positions(kv: PagedKV, plan: KvTiles, tile: Tile) -> Tensor:
    """Absolute positions [S] of a tile's tokens, on the CPU."""
    first = plan.positions[tile.first : tile.first + tile.num_pages, None]
    return (first + torch.arange(kv.page_tokens)).flatten()[tile.skip : tile.skip + tile.tokens]


def _scaled_queries(q: Tensor, kv: PagedKV, scale: float) -> Tensor:
    """q in float32, times everything that multiplies q . k."""
    queries = q.float() * scale
    return queries if kv.k_scale is None else queries * kv.k_scale


def _with_sinks(state: AttentionState, sinks_H: Tensor | None) -> AttentionState:
    """Let sinks join: each is a key whose value is 0, so its state is (0, sink)."""
    if sinks_H is None:
        return state
    out = torch.stack((state.out, torch.zeros_like(state.out)))
    return merge_in_torch(out, torch.stack((state.lse, sinks_H.expand_as(state.lse))))
