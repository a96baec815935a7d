"""What a rank remembers: tokens, pages, and which of a sequence's positions it holds."""

from math import ceil

import numpy as np
import pytest
import torch

from leanserve.contracts.batch import NewSequence, Row
from leanserve.contracts.errors import EngineError
from leanserve.contracts.kv_sharding import PageGrant
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.ranks import Ranks
from leanserve.worker.decode_rows import DecodeRows
from leanserve.worker.inputs import StepInputs, mixed_inputs, split_rows
from leanserve.worker.sequences import LiveSequences

T = 4


def started(sequence_id: int, tokens: list[int]) -> NewSequence:
    return NewSequence(sequence_id, np.array(tokens, np.int32).tobytes(), len(tokens), SamplingParams(), 0)


def test_pages_are_kept_by_their_owner_only():
    """Seven tokens over three ranks, two pages: rank 2 owns nothing, which is the ordinary case."""
    held = {}
    for rank in range(3):
        live = LiveSequences(rank, T)
        live.apply([], [started(9, list(range(7)))], [PageGrant(9, 0, 1, 5), PageGrant(9, 1, 0, 8)])
        sequence = live[9]
        held[rank] = (sequence.tokens_here(7, T), sequence.page_at(np.arange(7), T).tolist())
    assert held == {
        0: (3, [-1, -1, -1, -1, 8, 8, 8]),
        1: (4, [5, 5, 5, 5, -1, -1, -1]),
        2: (0, [-1] * 7),
    }


def test_tokens_grow_one_by_one():
    live = LiveSequences(0, T)
    live.apply([], [started(1, [3])], [])
    for token in range(100):
        live[1].append_token(token)
    assert live[1].tokens[:101].tolist() == [3, *range(100)]
    assert live[1].num_tokens == 101


def test_a_dropped_sequence_is_forgotten_and_naming_it_is_an_error():
    live = LiveSequences(0, T)
    live.apply([], [started(1, [3])], [])
    live.apply([1], [], [])
    assert len(live) == 0
    with pytest.raises(EngineError, match="sequence 1, which rank 0 does not hold"):
        live[1]


def test_a_sequence_may_start_again_in_the_step_that_drops_it():
    live = LiveSequences(0, T)
    live.apply([], [started(1, [3])], [PageGrant(1, 0, 0, 4)])
    live.apply([1], [started(1, [3, 5])], [PageGrant(1, 0, 0, 6)])
    assert live[1].num_tokens == 2
    assert live[1].pages[:1].tolist() == [6]


CPU = torch.device("cpu")


def laid_out(rows: list[Row], live: LiveSequences, ranks: Ranks) -> StepInputs:
    decode, prefill = split_rows(rows)
    decode_rows = DecodeRows(max_rows=4, max_pages=3, page_tokens=T, device=CPU)
    decode_rows.arrange(decode, [live[row.sequence_id] for row in decode])
    return mixed_inputs(decode_rows.inputs(len(decode)), prefill, live, T, ranks)


def test_a_step_is_laid_out_decode_rows_first():
    live = LiveSequences(0, T)
    live.apply(
        [],
        [started(1, [10, 11, 12, 13, 14]), started(2, [20, 21, 22])],
        [PageGrant(1, 0, 0, 7), PageGrant(1, 1, 0, 3), PageGrant(2, 0, 0, 1)],
    )
    inputs = laid_out([Row(1, 4, 1, True), Row(2, 0, 2, False)], live, Ranks.single(CPU))
    assert inputs.tokens_N.tolist() == [14, 20, 21]
    assert inputs.prompt_lengths_N.tolist() == [5, 3, 3]
    assert inputs.prefill_samples.owners.tolist() == []
    layout = inputs.layout
    assert layout.positions_N.tolist() == [4, 0, 1]
    assert layout.pages_N.tolist() == [3, 1, 1]
    assert layout.slots_N.tolist() == [0, 0, 1]
    assert layout.decode.page_table_BM.tolist() == [[7, 3, 0]]
    assert layout.decode.page_positions_BM.tolist() == [[0, 4, 0]]
    assert layout.decode.lengths_B.tolist() == [5]
    assert layout.prefill.lengths_B.tolist() == [2]
    assert layout.share is not None
    assert layout.share.q_offsets.tolist() == [0, 2]


def test_the_last_chunk_of_one_token_behind_a_prefill_stays_a_prefill_row():
    live = LiveSequences(0, T)
    live.apply([], [started(1, [1, 2]), started(2, [3])], [PageGrant(1, 0, 0, 0), PageGrant(2, 0, 0, 1)])
    inputs = laid_out([Row(1, 0, 2, True), Row(2, 0, 1, True)], live, Ranks.single(CPU))
    assert inputs.layout.decode is None
    assert inputs.layout.share is not None
    assert inputs.layout.share.q_offsets.tolist() == [0, 2, 3]
    assert inputs.prefill_samples.rows.tolist() == [1, 2]


def test_each_rank_computes_the_tokens_of_its_own_pages_and_no_other():
    """Two prompts dealt to three ranks: N ranks share the work to within a page, and together they do it once."""
    prompts = {1: 23, 2: 9}
    grants = [PageGrant(i, o, (o + i) % 3, 10 * i + o) for i, length in prompts.items() for o in range(-(-length // T))]
    rows = [Row(1, 0, 23, True), Row(2, 0, 9, True)]
    seen: list[tuple[int, int]] = []
    for rank in range(3):
        live = LiveSequences(rank, T)
        live.apply([], [started(i, [100 * i + t for t in range(length)]) for i, length in prompts.items()], grants)
        inputs = laid_out(rows, live, Ranks(rank, 3, CPU, group=None, stages_through_host=False))
        assert inputs.layout.share is not None
        assert len(inputs.tokens_N) == inputs.layout.share.tokens_per_rank[rank]
        assert len(inputs.tokens_N) <= sum(ceil(ceil(length / T) / 3) * T for length in prompts.values())
        assert (inputs.layout.pages_N >= 0).all()
        seen += zip(inputs.tokens_N.tolist(), inputs.layout.positions_N.tolist(), strict=True)
        owned = [rank == owner for owner in inputs.prefill_samples.owners]
        lasts = [
            inputs.tokens_N[row].item() for row, mine in zip(inputs.prefill_samples.rows, owned, strict=True) if mine
        ]
        assert lasts == [last for last, mine in zip([122, 208], owned, strict=True) if mine]
    assert sorted(seen) == [(100 * i + t, t) for i, length in prompts.items() for t in range(length)]


def test_a_sequence_may_start_behind_pages_that_another_filled():
    """Two of three pages are lent; they are on both ranks, and stay with the one when the other is dropped."""
    tokens = list(range(10))
    rows, layouts = [Row(2, 2 * T, 2, True)], []
    for rank in range(2):
        live = LiveSequences(rank, T)
        live.apply([], [started(1, tokens[:9])], [PageGrant(1, 0, 0, 5), PageGrant(1, 1, 1, 7), PageGrant(1, 2, 0, 6)])
        lent = [PageGrant(2, 0, 0, 5), PageGrant(2, 1, 1, 7)]
        live.apply([], [started(2, tokens)], [*lent, PageGrant(2, 2, 1, 8)])
        live.apply([1], [], [])
        ranks = Ranks(rank, 2, CPU, group=None, stages_through_host=False)
        layouts.append(laid_out(rows, live, ranks).layout)
    here, there = layouts
    assert (here.pages_N.tolist(), there.pages_N.tolist()) == ([], [8, 8])
    assert (here.positions_N.tolist(), there.positions_N.tolist()) == ([], [8, 9])
    assert (here.prefill.page_table_BM.tolist(), there.prefill.page_table_BM.tolist()) == ([[5, 0]], [[7, 8]])
    assert (here.prefill.page_positions_BM.tolist(), there.prefill.page_positions_BM.tolist()) == ([[0, 0]], [[4, 8]])
    assert (here.prefill.lengths_B.tolist(), there.prefill.lengths_B.tolist()) == ([4], [6])
