"""Which keys a sequence sees, cut into tiles, and one tile read: the portable path's view of the pages.

A tile is a run of one sequence's tokens that is attended to at once. Pages that follow one another in the pool are read
where they lie, as a batch; others are copied into one piece first, so few that they stay in the cache until they are
multiplied. Planning looks at page tables only; it knows nothing of queries or softmax.

Shapes: B sequences, K KV heads, D head dim, P pages of the pool, T tokens of a page, M max_pages, R tiles of a group,
S tokens of a tile.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lean_attention.paged_kv import PagedKV

TILE_ELEMENTS = 1 << 20
"""K * S * D of a tile that is copied: 4 MB of float32 keys, which 2 cores with 2 MB of L2 each read best."""
LONG_TILE_ELEMENTS = 1 << 24
"""K * S * D of a tile that is read where it lies, or by so many queries that the copy does not count."""
IN_PLACE_HEAD_ELEMENTS = 1 << 12
"""The least T * D of pages that are attended to one by one: below, a copy is cheaper than a product for each."""
IN_PLACE_ELEMENTS = 1 << 18
"""The least K * S * D of adjacent pages that are worth a call of their own: 1 MB of float32 keys."""


class Tile(NamedTuple):
    """Tokens `skip` up to `skip + tokens` of the pages `pages[first : first + num_pages]`, all of one sequence."""

    group: int
    """Tiles of one group are read and multiplied together."""
    sequence: int
    first: int
    num_pages: int
    skip: int
    tokens: int
    adjacent: int
    """1 if the page ids rise by one: the tile is a slice of the pool."""
    in_place: int
    """1 if the pages, whole and adjacent, are read as they lie: as a batch [num_pages, K, T, D]."""
    page: int
    """The first page's id."""


@dataclass(frozen=True, eq=False)
class KvTiles:
    """The pages that hold a key some query of the sequence sees, and the tiles over them. On the CPU."""

    pages: Tensor
    """[n] int64 page ids, sequence by sequence."""

    positions: Tensor
    """[n] int64, the absolute position of each page's first token."""

    table: Tensor
    """[tiles, 9] int64, the fields of `Tile`; ordered by sequence."""

    def groups(self) -> list[list[tuple[int, Tile]]]:
        """The tiles with their row in `table`, group by group."""
        groups: dict[int, list[tuple[int, Tile]]] = {}
        for row, fields in enumerate(self.table.tolist()):
            tile = Tile(*fields)
            groups.setdefault(tile.group, []).append((row, tile))
        return list(groups.values())


def cut_tiles(
    kv: PagedKV,
    first_seen: Tensor | None = None,
    last_seen: Tensor | None = None,
    *,
    tile_elements: int,
    page_elements: int,
    in_place: bool = False,
) -> KvTiles:
    """Tiles over the keys whose absolute position p has first_seen <= p <= last_seen ([B] int64; None means no bound).

    The lower bound is exact. The upper one leaves out whole pages only. A tile of several pages has at most
    `tile_elements` (K * S * D), a tile inside one page at most `page_elements`. So has a tile of pages that are not
    copied, which `in_place` allows.
    Raises ValueError if a sequence has more tokens than pages, or lists a page that the pool has not.
    """
    T, max_pages = kv.page_tokens, kv.page_table.shape[1]
    lengths = kv.lengths.long().cpu()[:, None]
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= max_pages * T:
        raise ValueError(
            f"lengths run from {int(lengths.min())} to {int(lengths.max())} tokens; allowed: 0 to {max_pages * T} "
            f"({max_pages} pages of {T} in the page table)"
        )
    # A table may be far wider than what its sequences need today.
    used_pages = -(-int(lengths.max()) // T) if lengths.numel() else 0
    table = kv.page_table[:, :used_pages].long().cpu()
    starts = torch.arange(used_pages) * T
    filled = (lengths - starts).clamp(0, T)
    positions = starts if kv.page_positions is None else kv.page_positions[:, :used_pages].long().cpu()
    skip = torch.zeros_like(filled)
    if first_seen is not None:
        skip = (first_seen.cpu()[:, None] - positions).clamp(0, T)
    seen = skip < filled
    if last_seen is not None:
        seen &= positions <= last_seen.cpu()[:, None]
    pages, filled, skip = table[seen], filled[seen], skip[seen]
    positions = positions.expand(seen.shape)[seen]
    if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < kv.k.shape[0]:
        raise ValueError(
            f"page_table lists pages {int(pages.min())} to {int(pages.max())}; the pool has 0 to {kv.k.shape[0] - 1}"
        )
    counts = seen.sum(dim=1)
    # Only the first page of a tile may be entered in its middle: cut at each such page, and between sequences.
    cuts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0), skip.nonzero().flatten())).unique()
    sequence_of = torch.arange(kv.num_sequences).repeat_interleave(counts)
    breaks = torch.cat((torch.zeros(1, dtype=torch.int64), (pages.diff() != 1).cumsum(0)))
    stays = torch.zeros_like(pages, dtype=torch.bool)
    if in_place and T * kv.head_dim >= IN_PLACE_HEAD_ELEMENTS and pages.numel():
        stays, starts = _long_runs(breaks, sequence_of, (filled == T) & (skip == 0), kv.num_kv_heads * T * kv.head_dim)
        cuts = torch.cat((cuts, starts)).unique()
    tile_tokens, piece_tokens = (max(1, n // (kv.num_kv_heads * kv.head_dim)) for n in (tile_elements, page_elements))
    tiles = _tiles(
        T, tile_tokens, piece_tokens, cuts.tolist(), sequence_of.tolist(), pages, filled, skip, breaks, stays
    )
    return KvTiles(pages, positions, torch.tensor(tiles, dtype=torch.int64).view(-1, len(Tile._fields)))


def _long_runs(breaks: Tensor, sequence_of: Tensor, whole: Tensor, page_elements: int) -> tuple[Tensor, Tensor]:
    """Of n > 0 pages, [n] bool: in a run of whole adjacent pages that is worth a call? And where to cut for that."""
    new = torch.ones_like(whole)
    new[1:] = (breaks.diff() != 0) | (sequence_of.diff() != 0) | ~whole[1:] | ~whole[:-1]
    run_of = new.cumsum(0) - 1
    long = (run_of.bincount() * page_elements >= IN_PLACE_ELEMENTS)[run_of] & whole
    beside = long.clone()
    beside[1:] |= long[:-1]
    return long, (new & beside).nonzero().flatten()


def _tiles(
    T: int,
    tile_tokens: int,
    piece_tokens: int,
    cuts: list[int],
    sequence_of: list[int],
    pages: Tensor,
    filled: Tensor,
    skip: Tensor,
    breaks: Tensor,
    stays: Tensor,
) -> list[Tile]:
    """Walk the pages between two cuts a tile at a time; number the groups on the way. Pages that stay are in place."""
    tile_pages, in_place_pages = max(1, tile_tokens // T), max(1, piece_tokens // T)
    filled_tokens, skipped_tokens, page_ids = filled.tolist(), skip.tolist(), pages.tolist()
    break_of, in_place_of = breaks.tolist(), stays.tolist()
    tiles: list[Tile] = []
    open_groups: dict[int, tuple[int, int]] = {}
    num_groups = 0
    for begin, end in pairwise(cuts):
        in_place = begin < end and in_place_of[begin]
        most = in_place_pages if in_place else tile_pages
        for first in range(begin, end, most):
            last = min(first + most, end) - 1
            count = last - first + 1
            adjacent = int(break_of[first] == break_of[last])
            stop = (count - 1) * T + filled_tokens[last]
            longest = piece_tokens if count == 1 else stop
            for token in range(skipped_tokens[first], stop, longest):
                # Short tiles of about the same size share a group; what is read in place, or larger, is walked alone.
                padded = 0 if in_place else 1 << (count - 1).bit_length()
                group, room = open_groups.get(padded, (num_groups, 0))
                if room == 0:
                    group, room = num_groups, 1 if in_place else max(1, tile_pages // padded)
                    num_groups += 1
                open_groups[padded] = (group, room - 1)
                tokens = min(stop - token, longest)
                where = (adjacent, int(in_place), page_ids[first])
                tiles.append(Tile(group, sequence_of[first], first, count, token, tokens, *where))
    return tiles


class TileReader:
    """Reads tiles of one pool as [R, K, S, D] of `dtype`: where they lie if they lie like that, else into one buffer.

    A tile that was read into the buffer is valid until the next read.
    """

    def __init__(self, pool: Tensor, tiles: KvTiles, dtype: torch.dtype) -> None:
        self._pool = pool
        self._page_ids = tiles.pages.to(pool.device)
        self._buffer = torch.empty(0, dtype=dtype, device=pool.device)

    def read(self, tiles: list[Tile]) -> Tensor:
        """Tiles of one group. A lone tile comes cut to its tokens; of several, all whole pages, padded with pages.

        Pages in place come as [num_pages, K, T, D].
        """
        if len(tiles) > 1:
            return self._read_group(tiles)
        tile = tiles[0]
        if tile.num_pages == 1 or tile.in_place:
            pages = self._pool[tile.page : tile.page + tile.num_pages, :, tile.skip : tile.skip + tile.tokens]
            return self._converted(pages)
        return self._read_one(tile)[None]

    def _read_one(self, tile: Tile) -> Tensor:
        pool = self._pool
        _, K, T, D = pool.shape
        tokens = slice(tile.skip, tile.skip + tile.tokens)
        page_stride, head_stride, token_stride, _ = pool.stride()
        if tile.adjacent and page_stride == T * token_stride:
            start = pool.storage_offset() + tile.page * page_stride
            keys = pool.as_strided((K, tile.num_pages * T, D), (head_stride, token_stride, 1), start)
            return self._converted(keys[:, tokens])
        if tile.adjacent:
            pages = pool[tile.page : tile.page + tile.num_pages].transpose(0, 1)
            keys = self._room(pages.numel()).view(pages.shape).copy_(pages).view(K, -1, D)
        else:
            keys = self._gathered(self._page_ids[None, tile.first : tile.first + tile.num_pages])[0]
        return keys[:, tokens]

    def _read_group(self, tiles: list[Tile]) -> Tensor:
        count = max(tile.num_pages for tile in tiles)
        # A short tile is padded by repeating its last page; `blank_unseen` clears what does not count.
        index = [[tile.first + min(i, tile.num_pages - 1) for i in range(count)] for tile in tiles]
        return self._gathered(self._page_ids[torch.tensor(index, device=self._pool.device)])

    def _gathered(self, page_ids_RP: Tensor) -> Tensor:
        """Pages [R, P], wherever they lie, as [R, K, P * T, D]."""
        pool = self._pool
        R, num_pages = page_ids_RP.shape
        _, K, T, D = pool.shape
        room = self._room(R * K * num_pages * T * D)
        if pool.dtype == room.dtype and pool.is_contiguous():
            # One copy: the heads of a page are rows of memory.
            rows = page_ids_RP[:, None] * K + torch.arange(K, device=pool.device)[:, None]
            torch.index_select(pool.view(-1, T * D), 0, rows.flatten(), out=room.view(-1, T * D))
        else:
            pages = pool.index_select(0, page_ids_RP.flatten()).view(R, num_pages, K, T, D)
            room.view(R, K, num_pages, T, D).copy_(pages.transpose(1, 2))
        return room.view(R, K, num_pages * T, D)

    def _converted(self, keys: Tensor) -> Tensor:
        if keys.dtype == self._buffer.dtype:
            return keys
        return self._room(keys.numel()).view(keys.shape).copy_(keys)

    def _room(self, elements: int) -> Tensor:
        if self._buffer.numel() < elements:
            self._buffer = self._buffer.new_empty(elements)
        return self._buffer[:elements]


def blank_unseen(x_RKSD: Tensor, tiles: list[Tile]) -> None:
    """In what was read for several tiles: zero the tokens that do not count. They may hold NaN, and 0 * NaN is NaN."""
    for row, tile in enumerate(tiles):
        x_RKSD[row, :, : tile.skip].zero_()
        x_RKSD[row, :, tile.skip + tile.tokens :].zero_()
