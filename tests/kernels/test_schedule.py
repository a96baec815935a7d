"""The stream-K schedule as arithmetic: the specification that the device plan and the kernel are held to."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_attention.schedule import Schedule, holder, merge_groups, share, visible_tokens

SCHEDULES = st.builds(
    lambda lengths, tile, heads, ctas, least: Schedule(tuple((0, n) for n in lengths), tile, heads, ctas, least),
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 300, 5000]), max_size=6),
    st.sampled_from([16, 64]),
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 4),
)


@settings(max_examples=200)
@given(SCHEDULES)
def test_every_tile_is_dealt_once_and_evenly(schedule):
    dealt, loads = [], []
    for cta in range(schedule.num_ctas):
        pieces = schedule.pieces(cta)
        dealt += [(p.sequence, p.kv_head, tile) for p in pieces for tile in range(p.begin, p.end)]
        loads.append(sum(p.end - p.begin for p in pieces))
    assert dealt == [
        (b, h, tile) for b, n in enumerate(schedule.tiles) for h in range(schedule.num_kv_heads) for tile in range(n)
    ]
    working = loads[: schedule.active_ctas]
    assert max(working) - min(working) <= 1
    assert not any(loads[schedule.active_ctas :])
    assert set(schedule.empty) == {b for b, n in enumerate(schedule.tiles) if n == 0}


@settings(max_examples=200)
@given(SCHEDULES)
def test_pieces_of_a_row_lie_where_the_reducer_looks(schedule):
    pieces = [p for cta in range(schedule.num_ctas) for p in schedule.pieces(cta)]
    slots = [p.slot for p in pieces if p.slot is not None]
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < 2 * schedule.num_ctas for slot in slots)
    for sequence, head, line in schedule.rows():
        first_cta, count = schedule.row_pieces(sequence, line)
        mine = [p for p in pieces if (p.sequence, p.kv_head) == (sequence, head)]
        assert [p.cta for p in mine] == list(range(first_cta, first_cta + count))
        expected = [2 * first_cta + 1, *(2 * cta for cta in range(first_cta + 1, first_cta + count))]
        assert [p.slot for p in mine] == ([None] if count == 1 else expected)


@given(st.integers(0, 200), st.integers(1, 50))
def test_holder_inverts_share(total, parts):
    runs = [share(part, total, parts) for part in range(parts)]
    assert runs[0][0] == 0
    assert runs[-1][1] == total
    for part, (begin, end) in enumerate(runs):
        assert {holder(item, total, parts) for item in range(begin, end)} <= {part}


@pytest.mark.parametrize(
    ("pieces", "fan_in", "width"),
    [(2, 32, 32), (32, 32, 32), (33, 32, 8), (132, 32, 16), (1024, 32, 32), (1025, 32, 64), (11, 2, 4)],
)
def test_two_levels_are_always_enough(pieces, fan_in, width):
    assert merge_groups(pieces, fan_in) == width
    assert -(-pieces // width) <= width


def test_tiles_outside_the_window_are_not_dealt():
    assert visible_tokens(1000, 100, 999, None, 64) == (900, 1000)
    assert visible_tokens(1000, 5000, 999, None, 64) == (0, 1000)
    # The query is far ahead of this shard's tokens.
    assert visible_tokens(100, 10, 999, None, 64) == (100, 100)
    assert visible_tokens(130, 10, 999, [0, 512, 990], 64) == (128, 130)
    # Out of order: from the first page with a visible token to the last.
    assert visible_tokens(192, 10, 999, [960, 0, 990], 64) == (30, 192)
    schedule = Schedule((visible_tokens(1000, 100, 999, None, 64), (100, 100)), 64, 2, 3)
    assert (schedule.first_tile, schedule.tiles, schedule.empty) == ((14, 1), (2, 0), (1,))


def test_few_tiles_leave_ctas_idle_where_merging_would_cost_more():
    schedule = Schedule(((0, 640),), 64, 1, 132, min_tiles=4)
    assert (schedule.total, schedule.active_ctas) == (10, 3)
