"""The stream-K schedule in plain Python: what the device plan and the kernel must do, and what the tests hold them to.

All tiles of all (sequence, KV head) rows lie on one line, sequence by sequence and head by head, and are dealt to the
CTAs in contiguous runs of equal length (the first `total % active` get one more). A row that one CTA covers whole is
written at once. Of a row that several CTAs share, each leaves one piece in scratch memory, and whoever arrives last
merges them.

    row      | 0       | 1   | 2           |
    tiles    | . . . . | . . | . . . . . . |
    CTA        0 0 0 1   1 1   2 2 3 3 4 4
    slot       1     2   -     5   6   8

A CTA leaves at most two pieces: of the row it starts in the middle of (slot 2c), and of the row it does not finish
(slot 2c + 1). So a row's pieces are found without a list: the first lies in its CTA's odd slot, the others in even
ones.

It knows nothing of devices, dtypes or softmax. (Stream-K: Osama et al., arXiv 2301.03598; for attention: LeanAttention,
arXiv 2405.10480.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Piece", "Schedule", "merge_groups", "share", "visible_tokens"]


def visible_tokens(
    length: int, window: int | None, q_position: int, page_positions: Sequence[int] | None, page_tokens: int
) -> tuple[int, int]:
    """The range [first, end) of a sequence's local tokens outside which nothing is visible to the query.

    Tokens at positions up to q_position - window are out of sight. Pages may be listed in any order of position: the
    range then runs from the first page with a visible token to the last one.
    """
    if window is None:
        return 0, length
    oldest = q_position - window + 1
    if page_positions is None:
        return min(max(oldest, 0), length), length
    first, end = length, 0
    for page in range(-(-length // page_tokens)):
        begin, stop = page * page_tokens, min(length, (page + 1) * page_tokens)
        seen = begin + max(0, oldest - page_positions[page])
        if seen < stop:
            first, end = min(first, seen), stop
    return min(first, end), end


def share(index: int, total: int, parts: int) -> tuple[int, int]:
    """Run [begin, end) number `index` of `total` items dealt to `parts` in equal contiguous runs, longer ones first."""
    base, extra = divmod(total, parts)
    begin = index * base + min(index, extra)
    return begin, begin + base + (index < extra)


def holder(item: int, total: int, parts: int) -> int:
    """Which part of `share` holds the item: its inverse."""
    base, extra = divmod(total, parts)
    longer = extra * (base + 1)
    return item // (base + 1) if item < longer else extra + (item - longer) // base


def merge_groups(pieces: int, fan_in: int) -> int:
    """How many pieces a row's first merge level takes at a time.

    Rows of up to `fan_in` pieces merge at once. Beyond that the width is the smallest power of two with which two
    levels are enough, at most `width` groups of `width` pieces: whoever comes last waits for one group's merge and one
    of the groups', and 33 pieces are 8 and then 5, not 32 and then 2.
    """
    width = 2 if pieces > fan_in else fan_in
    while width * width < pieces and width < pieces:
        width *= 2
    return width


@dataclass(frozen=True)
class Piece:
    """Tiles [begin, end) of one row, computed by one CTA."""

    cta: int
    sequence: int
    kv_head: int
    begin: int
    """First tile, counted from the sequence's token 0."""
    end: int
    slot: int | None
    """Where the piece waits to be merged; None if it is the whole row."""


@dataclass(frozen=True)
class Schedule:
    """A step's tiles dealt to CTAs."""

    visible: tuple[tuple[int, int], ...]
    """Per sequence: the range of tokens to attend to (see `visible_tokens`)."""

    tile: int
    """Tokens of a tile."""

    num_kv_heads: int

    num_ctas: int
    """G, the grid."""

    min_tiles: int = 1
    """Fewer CTAs work where each would otherwise get fewer tiles than this."""

    @property
    def first_tile(self) -> tuple[int, ...]:
        """Per sequence: its first tile that is dealt."""
        return tuple(first // self.tile for first, _ in self.visible)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Per sequence: the tiles of each of its rows; tiles outside the visible range are not dealt."""
        return tuple(0 if end <= first else -(-end // self.tile) - first // self.tile for first, end in self.visible)

    @property
    def total(self) -> int:
        """Tiles on the line."""
        return self.num_kv_heads * sum(self.tiles)

    @property
    def active_ctas(self) -> int:
        """CTAs that get tiles."""
        return min(self.num_ctas, max(1, -(-self.total // self.min_tiles)))

    @property
    def empty(self) -> tuple[int, ...]:
        """Sequences without a visible token: CTAs write their zeros in turn."""
        return tuple(b for b, tiles in enumerate(self.tiles) if tiles == 0)

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """(sequence, KV head, place of the row's first tile on the line), in line order; empty rows are left out."""
        line = 0
        for sequence, tiles in enumerate(self.tiles):
            for head in range(self.num_kv_heads if tiles else 0):
                yield sequence, head, line
                line += tiles

    def row_pieces(self, sequence: int, line: int) -> tuple[int, int]:
        """(first CTA, pieces) of the row of `sequence` whose first tile is at `line`."""
        tiles = self.tiles[sequence]
        first = holder(line, self.total, self.active_ctas)
        return first, holder(line + tiles - 1, self.total, self.active_ctas) - first + 1

    def pieces(self, cta: int) -> list[Piece]:
        """A CTA's pieces, in the order it computes them."""
        if cta >= self.active_ctas:
            return []
        begin, end = share(cta, self.total, self.active_ctas)
        found = []
        for sequence, head, line in self.rows():
            first, stop = max(begin, line), min(end, line + self.tiles[sequence])
            if first >= stop:
                continue
            first_cta, pieces = self.row_pieces(sequence, line)
            slot = None if pieces == 1 else 2 * cta + (cta == first_cta)
            offset = self.first_tile[sequence] - line
            found.append(Piece(cta, sequence, head, first + offset, stop + offset, slot))
        return found
