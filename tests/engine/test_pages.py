import random
from itertools import pairwise

import pytest

from leanserve.contracts.kv_sharding import KvSharding, PageGrant
from leanserve.engine.page_pool import PagePool, PageRun
from leanserve.engine.pages import PageAllocator, SequencePages


def allocator(*pages_per_rank: int) -> PageAllocator:
    return PageAllocator(KvSharding(page_tokens=16, pages_per_rank=pages_per_rank))


def ranks(grants: list[PageGrant]) -> list[int]:
    return [grant.rank for grant in grants]


def runs_of(grants: list[PageGrant], rank: int) -> list[list[int]]:
    """A sequence's pages on a rank, in order, cut where they are not adjacent and ascending."""
    runs: list[list[int]] = []
    for page in (grant.page for grant in grants if grant.rank == rank):
        if runs and page == runs[-1][-1] + 1:
            runs[-1].append(page)
        else:
            runs.append([page])
    return runs


def test_pages_go_to_the_ranks_in_turn_and_the_first_to_the_least_loaded() -> None:
    pages = allocator(9, 9, 9)
    first = SequencePages(1)
    assert ranks(pages.grow(first, 4, expected_pages=5)) == [0, 1, 2, 0]
    assert ranks(pages.grow(SequencePages(2), 2, expected_pages=2)) == [1, 2]
    assert ranks(pages.grow(SequencePages(3), 1, expected_pages=1)) == [0]
    grants = pages.grow(first, 1, expected_pages=5)
    assert [(grant.ordinal, grant.rank) for grant in grants] == [(4, 1)], "its own turn goes on"
    assert pages.used_per_rank == (3, 3, 2)


def test_a_sequence_keeps_its_turn_whatever_the_load() -> None:
    pages = allocator(9, 9, 9)
    sequences = [SequencePages(number) for number in range(4)]
    assert [ranks(pages.grow(sequence, 1, expected_pages=2)) for sequence in sequences] == [[0], [1], [2], [0]]
    pages.release(sequences[2])
    assert ranks(pages.grow(sequences[0], 1, expected_pages=2)) == [1], "rank 2 has less to read"


def test_a_rank_without_free_pages_is_passed_over_and_every_page_is_used() -> None:
    pages = allocator(1, 4, 0, 2)
    sequence = SequencePages(1)
    assert ranks(pages.grow(sequence, 7, expected_pages=7)) == [0, 1, 3, 1, 3, 1, 1]
    assert pages.num_free == 0
    pages.release(sequence)
    assert pages.num_free == 7
    assert pages.used_per_rank == (0, 0, 0, 0)
    assert ranks(pages.grow(sequence, 2, expected_pages=2)) == [0, 1], "it may start again"


def test_a_sequence_lies_in_one_run_per_rank_however_many_grow_at_once() -> None:
    """Prompts in chunks and decode pages one by one, interleaved: what is kept behind each run keeps them whole."""
    pages = allocator(512, 512)
    sequences = [SequencePages(number) for number in range(16)]
    grants: list[list[PageGrant]] = [[] for _ in sequences]
    for _ in range(32):
        for number, sequence in enumerate(sequences):
            grants[number] += pages.grow(sequence, 2, expected_pages=64)
    assert pages.num_free == 0
    assert {len(runs_of(grants[number], rank)) for number in range(16) for rank in range(2)} == {1}


def test_what_is_kept_for_one_is_shared_when_another_needs_it() -> None:
    """All expect the whole pool, and none is refused a page; the runs are as long as halving allows."""
    pages = allocator(256)
    sequences = [SequencePages(number) for number in range(8)]
    grants: list[list[PageGrant]] = [[] for _ in sequences]
    for _ in range(32):
        for number, sequence in enumerate(sequences):
            grants[number] += pages.grow(sequence, 1, expected_pages=256)
    assert pages.num_free == 0
    assert {len(runs_of(grants[number], 0)) for number in range(8)} == {1}


def pool_with_open_ranges(num_pages: int, *ranges: tuple[int, int]) -> PagePool:
    """All other pages are in use."""
    pool = PagePool(num_pages)
    cuts = sorted({0, num_pages, *(page for bounds in ranges for page in bounds)})
    runs: list[PageRun] = []
    for first, end in pairwise(cuts):
        run = None
        for _ in range(first, end):
            _, run = pool.take(run, end - first)
        assert run is not None
        assert (run.first, run.end, run.limit) == (first, end, end)
        runs.append(run)
    for run in runs:
        if (run.first, run.end) in ranges:
            pool.close(run)
            pool.free(run.first, run.end)
    return pool


def test_a_run_goes_on_past_its_expectation_while_the_next_page_is_free() -> None:
    pool = pool_with_open_ranges(20, (2, 4), (6, 7), (9, 13))
    page, run = pool.take(None, 3)
    pages = [page]
    while pool.num_free:
        page, run = pool.take(run, 1)
        pages.append(page)
    assert pages == [9, 10, 11, 12, 6, 2, 3]


def test_a_new_run_takes_the_smallest_range_that_surely_holds_it() -> None:
    for expected, first in ((1, 2), (2, 4), (3, 10), (4, 10), (5, 10), (9, 10), (50, 10)):
        page, _ = pool_with_open_ranges(40, (2, 3), (4, 6), (10, 17)).take(None, expected)
        assert page == first, f"{expected} pages expected"


@pytest.mark.parametrize("num_pages", [1, 7, 64, 1000])
def test_a_pool_never_gives_a_page_twice_nor_loses_one(num_pages: int) -> None:
    rng = random.Random(num_pages)
    pool = PagePool(num_pages)
    live: list[list[PageRun]] = []
    used: set[int] = set()
    for _ in range(6000):
        if used and (rng.random() < 0.02 or not pool.num_free):
            for run in live.pop(rng.randrange(len(live))):
                used -= set(range(run.first, run.end))
                pool.close(run)
                pool.free(run.first, run.end)
        elif not live or rng.random() < 0.05:
            live.append([])
        else:
            runs = rng.choice(live)
            page, run = pool.take(runs[-1] if runs else None, rng.randint(1, num_pages))
            assert 0 <= page < num_pages
            assert page not in used
            used.add(page)
            if not runs or runs[-1] is not run:
                runs.append(run)
        assert pool.num_used == len(used)
        assert pool.num_free == num_pages - len(used)
    for runs in live:
        for run in runs:
            pool.close(run)
            pool.free(run.first, run.end)
    run, taken = None, []
    while pool.num_free:
        page, run = pool.take(run, num_pages)
        taken.append(page)
    assert taken == list(range(num_pages)), "when all is given back the pool is one range again"
