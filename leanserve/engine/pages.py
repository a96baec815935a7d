"""Which rank, and which page there, holds the next tokens of a sequence. Knows page counts only; no tokens."""

from leanserve.contracts.kv_sharding import KvSharding, PageGrant
from leanserve.engine.page_pool import PagePool, PageRun

__all__ = ["PageAllocator", "SequencePages"]


class SequencePages:
    """The pages that one sequence holds, over all ranks."""

    __slots__ = ("count", "next_rank", "runs", "sequence_id")

    def __init__(self, sequence_id: int) -> None:
        self.sequence_id = sequence_id
        self.count = 0
        self.next_rank: int | None = None
        """Whose turn it is; None before the first page."""
        self.runs: dict[int, list[PageRun]] = {}
        """By rank, the newest last."""


class PageAllocator:
    """Deals every sequence's pages to the ranks in turn, the first page to the least loaded rank.

    A rank without a free page is passed over: any owner is correct. So the pools, even or not, can be used to the last
    page. A page costs O(1), giving a sequence's pages back costs O(runs).
    """

    def __init__(self, sharding: KvSharding) -> None:
        self.sharding = sharding
        self._pools = tuple(PagePool(pages) for pages in sharding.pages_per_rank)
        self.num_free = sum(sharding.pages_per_rank)
        """Free pages of all ranks together."""

    @property
    def used_per_rank(self) -> tuple[int, ...]:
        """Pages that live sequences hold, by rank."""
        return tuple(pool.num_used for pool in self._pools)

    def grow(self, pages: SequencePages, count: int, expected_pages: int) -> list[PageGrant]:
        """Grant the next `count` pages of a sequence, at most `num_free`.

        `expected_pages` is how many it may hold in the end; it helps to place them side by side and binds nobody.
        """
        assert count <= self.num_free, f"grow() by {count} pages with {self.num_free} free"
        num_ranks = len(self._pools)
        grants: list[PageGrant] = []
        for ordinal in range(pages.count, pages.count + count):
            rank = self._least_loaded_rank() if pages.next_rank is None else pages.next_rank
            while not self._pools[rank].num_free:
                rank = (rank + 1) % num_ranks
            expected_here = -(-max(expected_pages - ordinal, 1) // num_ranks)
            runs = pages.runs.setdefault(rank, [])
            page, run = self._pools[rank].take(runs[-1] if runs else None, expected_here)
            if not runs or runs[-1] is not run:
                runs.append(run)
            pages.next_rank = (rank + 1) % num_ranks
            grants.append(PageGrant(pages.sequence_id, ordinal, rank, page))
        pages.count += count
        self.num_free -= count
        return grants

    def release(self, pages: SequencePages) -> None:
        """Give all pages of a sequence back; it may start again from none."""
        for rank, runs in pages.runs.items():
            for run in runs:
                self._pools[rank].give_back(run)
        self.num_free += pages.count
        pages.count = 0
        pages.next_rank = None
        pages.runs.clear()

    def _least_loaded_rank(self) -> int:
        """The rank with the fewest pages in use, as those are what a decode step reads; ties go to the lower rank."""
        return min(
            (rank for rank, pool in enumerate(self._pools) if pool.num_free),
            key=lambda rank: self._pools[rank].num_used,
        )
