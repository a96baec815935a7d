"""Which rank, and which page there, holds the next tokens of a sequence. Knows pages and their names; no tokens."""

from array import array

from leanserve.contracts.kv_sharding import KvSharding, PageCopy, PageGrant
from leanserve.engine.page_pool import PagePool, PageRun
from leanserve.engine.prefix_cache import PrefixCache

__all__ = ["PageAllocator", "SequencePages"]

_COPY_SLACK_PAGES, _COPY_SLACK_SHARE = 4, 32
"""A copy may go to a rank that holds so many pages more than the least loaded one, and a 32nd of its pool."""

_FORGOTTEN_AT_ONCE = 32
"""Idle pages that make room together, if the sequence wants as many: so what they leave is not single pages."""


class SequencePages:
    """The pages that one sequence holds, over all ranks: shared ones first, then its own."""

    __slots__ = ("next_rank", "num_shared", "numbers", "runs", "sequence_id")

    def __init__(self, sequence_id: int) -> None:
        self.sequence_id = sequence_id
        self.numbers: list[int] = []
        """By ordinal: the page's number over all ranks."""
        self.num_shared = 0
        """Leading pages that it did not fill itself."""
        self.next_rank: int | None = None
        """Whose turn it is; None before the first page of its own."""
        self.runs: dict[int, list[PageRun]] = {}
        """Its own pages by rank, the newest last."""

    @property
    def count(self) -> int:
        return len(self.numbers)


class PageAllocator:
    """Deals every sequence's pages to the ranks in turn, the first of its own to the least loaded rank.

    A rank without a free page is passed over: any owner is correct. So the pools, even or not, can be used to the last
    page. A named page that no sequence holds any more is kept for the next one that begins alike, and is free all the
    same: it makes room when no other page of its rank is free. Taking and giving back cost O(1) a page.
    """

    def __init__(self, sharding: KvSharding) -> None:
        self.sharding = sharding
        self._pools = tuple(PagePool(pages) for pages in sharding.pages_per_rank)
        self._cache = PrefixCache(sharding.num_ranks, max(sharding.pages_per_rank))
        self.num_free = sum(sharding.pages_per_rank)
        """Pages of all ranks that no sequence holds."""

    @property
    def used_per_rank(self) -> tuple[int, ...]:
        """Pages that live sequences hold, by rank."""
        return tuple(self._used(rank) for rank in range(len(self._pools)))

    @property
    def idle_per_rank(self) -> tuple[int, ...]:
        """Pages that no sequence holds and that can be found by name, by rank."""
        return tuple(self._cache.num_idle(rank) for rank in range(len(self._pools)))

    def find(self, names: list[bytes]) -> list[int]:
        """The numbers of the pages that have these names, up to the first name that no page has."""
        return self._cache.find(names)

    def count_idle(self, numbers: list[int]) -> int:
        """How many of these pages no sequence holds: by so many `num_free` falls when they are shared."""
        return self._cache.count_idle(numbers)

    def share(self, pages: SequencePages, numbers: list[int]) -> list[PageGrant]:
        """Grant a sequence that has no page yet the pages that it begins with."""
        assert not pages.numbers, "share() with a sequence that has pages"
        self.num_free -= self._cache.hold(numbers)
        pages.numbers = numbers
        pages.num_shared = len(numbers)
        sequence_id, num_ranks = pages.sequence_id, len(self._pools)
        return [
            PageGrant(sequence_id, ordinal, number % num_ranks, number // num_ranks)
            for ordinal, number in enumerate(numbers)
        ]

    def following(self, parent: bytes) -> tuple[int, bytes] | None:
        """A page that follows the page named `parent`, by its number, with the tokens it is known to hold."""
        return self._cache.following(parent)

    def copy(self, pages: SequencePages, source: int, expected_pages: int) -> tuple[PageGrant, PageCopy] | None:
        """Grant a sequence its next page on the rank of page `source`, as a copy of that, before it has any of its own.

        None where that would put too much on one rank: the ranks are to be evenly loaded first of all.
        """
        rank = source % len(self._pools)
        slack_pages = _COPY_SLACK_PAGES + self._pools[rank].num_pages // _COPY_SLACK_SHARE
        if not self._has_free(rank) or self._used(rank) > self._used(self._least_loaded_rank()) + slack_pages:
            return None
        pages.next_rank = rank
        (grant,) = self.grow(pages, 1, expected_pages)
        pages.next_rank = None  # its other pages start on the least loaded rank, as if there were no copy
        return grant, PageCopy(rank, source // len(self._pools), grant.page)

    def count_releasable(self, pages: SequencePages, kept: frozenset[int]) -> int:
        """How many pages nobody holds any more when a sequence gives its own back; those in `kept` do not count."""
        return self._cache.count_held_once(number for number in pages.numbers if number not in kept)

    def grow(self, pages: SequencePages, count: int, expected_pages: int) -> list[PageGrant]:
        """Grant the next `count` pages of a sequence, at most `num_free`.

        `expected_pages` is how many it may hold in the end; it helps to place them side by side and binds nobody.
        """
        assert count <= self.num_free, f"grow() by {count} pages with {self.num_free} free"
        num_ranks = len(self._pools)
        grants: list[PageGrant] = []
        for ordinal in range(pages.count, pages.count + count):
            rank = self._least_loaded_rank() if pages.next_rank is None else pages.next_rank
            while not self._has_free(rank):
                rank = (rank + 1) % num_ranks
            expected_here = -(-max(expected_pages - ordinal, 1) // num_ranks)
            if not self._pools[rank].num_free:
                self._forget(rank, min(expected_here, _FORGOTTEN_AT_ONCE))
            runs = pages.runs.setdefault(rank, [])
            page, run = self._pools[rank].take(runs[-1] if runs else None, expected_here)
            if not runs or runs[-1] is not run:
                runs.append(run)
            number = page * num_ranks + rank
            self._cache.hold_new(number)
            pages.numbers.append(number)
            pages.next_rank = (rank + 1) % num_ranks
            grants.append(PageGrant(pages.sequence_id, ordinal, rank, page))
        self.num_free -= count
        return grants

    def owners(self, pages: SequencePages, count: int) -> bytes:
        """The ranks of a sequence's first `count` pages, as uint16 in native byte order."""
        num_ranks = len(self._pools)
        return array("H", [number % num_ranks for number in pages.numbers[:count]]).tobytes()

    def publish(self, pages: SequencePages, ordinal: int, name: bytes) -> None:
        """A sequence's page is full and computed: others that begin alike may share it from now on."""
        replaced = self._cache.publish(name, pages.numbers[ordinal])
        if replaced is not None:
            self._free(replaced)

    def remember(self, pages: SequencePages, ordinal: int, parent: bytes, token_ids: bytes) -> None:
        """A sequence's page, full or not, follows the page named `parent` and begins with these tokens, computed."""
        replaced = self._cache.remember(parent, pages.numbers[ordinal], token_ids)
        if replaced is not None:
            self._free(replaced)

    def withdraw(self, pages: SequencePages) -> None:
        """Nobody is to share a sequence's pages any more; who does already goes on."""
        self._cache.withdraw(pages.numbers)

    def release(self, pages: SequencePages) -> None:
        """A sequence holds its pages no more; it may start again from none."""
        num_ranks = len(self._pools)
        for rank, runs in pages.runs.items():
            pool = self._pools[rank]
            for run in reversed(runs):
                pool.close(run)
                end = run.end  # of the pages to free: what stays in use cuts the run into stretches
                for page in range(run.end - 1, run.first - 1, -1):
                    if not self._let_go(page * num_ranks + rank):
                        if page + 1 < end:
                            pool.free(page + 1, end)
                        end = page
                if run.first < end:
                    pool.free(run.first, end)
        for number in reversed(pages.numbers[: pages.num_shared]):
            self._let_go(number)
        pages.numbers = []
        pages.num_shared = 0
        pages.next_rank = None
        pages.runs.clear()

    def _let_go(self, number: int) -> bool:
        """Returns whether the page is of no use any more."""
        was_last, is_idle = self._cache.let_go(number)
        self.num_free += was_last
        return was_last and not is_idle

    def _forget(self, rank: int, count: int) -> None:
        for _ in range(min(count, self._cache.num_idle(rank))):
            self._free(self._cache.forget(rank))

    def _free(self, number: int) -> None:
        page, rank = divmod(number, len(self._pools))
        self._pools[rank].free(page, page + 1)

    def _used(self, rank: int) -> int:
        return self._pools[rank].num_used - self._cache.num_idle(rank)

    def _has_free(self, rank: int) -> bool:
        return self._pools[rank].num_free > 0 or self._cache.num_idle(rank) > 0

    def _least_loaded_rank(self) -> int:
        """The rank with the fewest pages held, as those are what a decode step reads; ties go to the lower rank."""
        return min((rank for rank in range(len(self._pools)) if self._has_free(rank)), key=self._used)
