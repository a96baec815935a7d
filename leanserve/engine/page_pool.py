"""One rank's free pages, as ranges, so that a sequence's pages lie side by side. Knows nothing of sequences or ranks.

Attention reads a run of adjacent pages as one block, so a sequence's pages on a rank should be few long runs, though
many sequences grow at once. A run therefore keeps a range behind it to grow into, as long as the sequence may become.
Kept pages are still free: when no other range is as good, somebody else's new run gets half of a large kept range.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["PagePool", "PageRun"]

Item = TypeVar("Item", bound=Hashable)


class PageRun:
    """Adjacent pages of one sequence: [first, end) are in use, [end, limit) are kept for it."""

    __slots__ = ("end", "first", "limit")

    def __init__(self, first: int, limit: int) -> None:
        self.first = first
        self.end = first
        self.limit = limit


class PagePool:
    """Pages [0, num_pages) of one rank. Operations cost O(1) amortised, whatever the pool's size or fragmentation."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_used = 0
        # Ranges that are neither in use nor kept, never two side by side: by first page, by end, and by length.
        self._end_of: dict[int, int] = {}
        self._first_of: dict[int, int] = {}
        self._open: _BySize[int] = _BySize()
        # Runs, by the length of the range kept behind them.
        self._keeping: _BySize[PageRun] = _BySize()
        self._open_range(0, num_pages)

    @property
    def num_free(self) -> int:
        return self.num_pages - self.num_used

    def take(self, run: PageRun | None, expected_pages: int) -> tuple[int, PageRun]:
        """Take one page: the one right behind `run` if it is free, else the first page of a new run.

        `expected_pages` (>= 1) is how many pages the sequence may still want here, this one included. At least one
        page must be free. Returns the page and the run it belongs to.
        """
        assert self.num_used < self.num_pages, "take() from a full pool"
        if run is None or not self._can_extend(run, expected_pages):
            run = self._new_run(expected_pages)
        page = run.end
        self._keeping.remove(run, run.limit - page)
        run.end = page + 1
        self._keeping.add(run, run.limit - run.end)
        self.num_used += 1
        return page, run

    def close(self, run: PageRun) -> None:
        """A run grows no more: what was kept behind it is open again. Its pages stay in use until `free`."""
        self._keeping.remove(run, run.limit - run.end)
        self._open_range(run.end, run.limit)
        run.limit = run.end

    def free(self, first: int, end: int) -> None:
        """Pages [first, end) of closed runs are in use no more."""
        self.num_used -= end - first
        self._open_range(first, end)

    def _can_extend(self, run: PageRun, expected_pages: int) -> bool:
        if run.end == run.limit and run.limit in self._end_of:
            run.limit = self._close_front(run.limit, expected_pages)
            self._keeping.add(run, run.limit - run.end)
        return run.end < run.limit

    def _new_run(self, expected_pages: int) -> PageRun:
        first = self._open.at_least(expected_pages)
        if first is None:
            first = self._open.large()
            open_pages = 0 if first is None else self._end_of[first] - first
            neighbour = self._keeping.large()
            if neighbour is not None and open_pages < expected_pages:
                kept_pages = neighbour.limit - neighbour.end
                shared_pages = (kept_pages + 1) // 2
                if shared_pages > open_pages:
                    first = self._open_range(neighbour.limit - shared_pages, neighbour.limit)
                    self._keeping.remove(neighbour, kept_pages)
                    neighbour.limit -= shared_pages
                    self._keeping.add(neighbour, neighbour.limit - neighbour.end)
        assert first is not None, "a pool with free pages has an open or a kept range"
        run = PageRun(first, self._close_front(first, expected_pages))
        self._keeping.add(run, run.limit - run.end)
        return run

    def _open_range(self, first: int, end: int) -> int:
        """Add [first, end) to the open ranges, joined with its neighbours. Returns the joined range's first page."""
        if first == end:
            return first
        if end in self._end_of:
            end = self._remove_open(end)
        if first in self._first_of:
            first = self._first_of[first]
            self._remove_open(first)
        self._end_of[first] = end
        self._first_of[end] = first
        self._open.add(first, end - first)
        return first

    def _close_front(self, first: int, pages: int) -> int:
        """Take up to `pages` pages off the front of the open range at `first`. Returns the end of what was taken."""
        end = self._remove_open(first)
        taken_end = min(end, first + pages)
        self._open_range(taken_end, end)
        return taken_end

    def _remove_open(self, first: int) -> int:
        end = self._end_of.pop(first)
        del self._first_of[end]
        self._open.remove(first, end - first)
        return end


class _BySize(Generic[Item]):
    """Items in classes by the power of two below their size; items of size 0 are not kept. Last in, first found."""

    def __init__(self) -> None:
        self._classes: list[dict[Item, None]] = []
        self._occupied = 0
        """Bit c is set when class c, of sizes [2**c, 2**(c + 1)), holds an item."""

    def add(self, item: Item, size: int) -> None:
        if size:
            number = size.bit_length() - 1
            while number >= len(self._classes):
                self._classes.append({})
            self._classes[number][item] = None
            self._occupied |= 1 << number

    def remove(self, item: Item, size: int) -> None:
        if size:
            number = size.bit_length() - 1
            del self._classes[number][item]
            if not self._classes[number]:
                self._occupied ^= 1 << number

    def at_least(self, size: int) -> Item | None:
        """An item that is surely of this size: from the smallest class where all are."""
        smallest = (size - 1).bit_length()
        classes = self._occupied >> smallest
        if not classes:
            return None
        return self._newest_of(smallest + (classes & -classes).bit_length() - 1)

    def large(self) -> Item | None:
        """An item more than half as large as the largest."""
        return self._newest_of(self._occupied.bit_length() - 1) if self._occupied else None

    def _newest_of(self, number: int) -> Item:
        # Taken out and put back: looking at the end of a dict walks over all that was deleted there, popitem clears it.
        item, _ = self._classes[number].popitem()
        self._classes[number][item] = None
        return item
