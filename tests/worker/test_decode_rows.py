"""Decode rows on the device: what an arrangement leaves there is what the host would compute from scratch."""

import random
from dataclasses import astuple

import numpy as np
import pytest
import torch

from leanserve.contracts.batch import NewSequence, Row
from leanserve.contracts.kv_sharding import PageGrant
from leanserve.contracts.sampling import SamplingParams
from leanserve.worker.decode_rows import DecodeRows
from leanserve.worker.sequences import LiveSequence, LiveSequences

T = 4
CPU = torch.device("cpu")
VOCAB_SIZE = 1000


class Crowd:
    """Sequences on one of three ranks that start, decode, stand by and end at random, with pages dealt in turn."""

    def __init__(self, seed: int, rank: int = 1) -> None:
        self.random = random.Random(seed)
        self.rank = rank
        self.live = LiveSequences(rank, T)
        self.ids: list[int] = []
        self.next_id = self.next_page = 0

    def change(self) -> None:
        """Some leave, some come, the order may change; everybody who is there can take one more token."""
        leaving = [i for i in self.ids if self.random.random() < 0.15]
        self.ids = [i for i in self.ids if i not in leaving]
        coming, grants = [], []
        for _ in range(self.random.randrange(3) if len(self.ids) < 6 else 0):
            self.next_id += 1
            tokens = [self.random.randrange(VOCAB_SIZE) for _ in range(self.random.randrange(1, 30))]
            prompt_tokens = self.random.randrange(1, len(tokens) + 1)
            coming.append(
                NewSequence(self.next_id, np.array(tokens, np.int32).tobytes(), prompt_tokens, SamplingParams(), 0)
            )
            grants += self.granted(self.next_id, range(-(-len(tokens) // T)))
        for i in self.ids:
            num_tokens = self.live[i].num_tokens
            if (num_tokens - 1) % T == 0:
                grants += self.granted(i, range((num_tokens - 1) // T, (num_tokens - 1) // T + 1))
        self.live.apply(leaving, coming, grants)
        self.ids += [new.sequence_id for new in coming]
        if self.random.random() < 0.2:
            self.random.shuffle(self.ids)

    def granted(self, sequence_id: int, ordinals: range) -> list[PageGrant]:
        grants = []
        for ordinal in ordinals:
            self.next_page += 1
            grants.append(PageGrant(sequence_id, ordinal, (ordinal + sequence_id) % 3, self.next_page))
        return grants

    def decoding(self) -> list[int]:
        """Who has a row in this step: mostly everybody."""
        return [i for i in self.ids if self.random.random() < 0.97]

    def rows(self, ids: list[int]) -> list[Row]:
        return [Row(i, self.live[i].num_tokens - 1, 1, True) for i in ids]

    def expected(self, sequence: LiveSequence) -> tuple[object, ...]:
        """(token, position, prompt length, page, slot, length, pages, their positions), from what the host knows."""
        position = sequence.num_tokens - 1
        return (
            int(sequence.tokens[position]),
            position,
            sequence.num_prompt_tokens,
            int(sequence.page_at(np.array([position]), T)[0]),
            position % T,
            sequence.tokens_here(position + 1, T),
            sequence.pages[: sequence.num_pages].tolist(),
            sequence.page_positions[: sequence.num_pages].tolist(),
        )


def found(rows: DecodeRows, num_rows: int, num_pages: list[int]) -> list[tuple[object, ...]]:
    inputs = rows.inputs(num_rows)
    pages = inputs.sequence_pages
    columns = (
        inputs.tokens_B,
        inputs.positions_B,
        inputs.prompt_lengths_B,
        inputs.pages_B,
        inputs.slots_B,
        pages.lengths_B,
    )
    return [
        (
            *(int(column[b]) for column in columns),
            pages.page_table_BM[b, :count].tolist(),
            pages.page_positions_BM[b, :count].tolist(),
        )
        for b, count in enumerate(num_pages)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_rows_follow_whoever_comes_goes_waits_and_grows(seed):
    crowd = Crowd(seed)
    rows = DecodeRows(max_rows=10, max_pages=40, page_tokens=T, device=CPU)
    for _ in range(250):
        crowd.change()
        ids = crowd.decoding()
        sequences = [crowd.live[i] for i in ids]
        rows.arrange(crowd.rows(ids), sequences)
        num_pages = [sequence.num_pages for sequence in sequences]
        assert found(rows, len(ids), num_pages) == [crowd.expected(sequence) for sequence in sequences]
        unused = rows.inputs(10)
        assert unused.pages_B[len(ids) :].tolist() == [-1] * (10 - len(ids))
        assert unused.sequence_pages.lengths_B[len(ids) :].tolist() == [0] * (10 - len(ids))
        tokens = torch.tensor([crowd.random.randrange(VOCAB_SIZE) for _ in ids], dtype=torch.int64)
        rows.advance(tokens, sequences)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append_token(token)


def test_a_step_in_which_nobody_comes_goes_or_grows_uploads_nothing(monkeypatch):
    """So the host's cost is O(batch), whatever the contexts."""
    live = LiveSequences(0, T)
    tokens = np.arange(5, dtype=np.int32).tobytes()
    live.apply([], [NewSequence(i, tokens, 3, SamplingParams(), 0) for i in range(3)], [])
    live.apply([], [], [PageGrant(i, ordinal, 0, 2 * i + ordinal) for i in range(3) for ordinal in range(2)])
    sequences = [live[i] for i in range(3)]
    rows = DecodeRows(max_rows=3, max_pages=4, page_tokens=T, device=CPU)
    uploads: list[int] = []
    upload = rows._upload

    def counted(parts):
        uploads.append(sum(map(len, parts)))
        return upload(parts)

    monkeypatch.setattr(rows, "_upload", counted)
    for position in range(4, 9):
        if position == 8:
            live.apply([], [], [PageGrant(1, 2, 0, 6)])
        rows.arrange([Row(i, position, 1, True) for i in range(3)], sequences)
        rows.advance(torch.tensor([7, 8, 9]), sequences)
    assert len(uploads) == 2, "when they joined, and when one got a page"
    assert uploads[1] == 3 + 3 + 4, "a page costs four numbers, and each row two"


def test_tokens_that_the_host_does_not_know_yet_are_found_on_the_device():
    """One that decodes on, and one whose prompt has just ended; they change places, and another joins between them."""
    live = LiveSequences(0, T)
    new = [NewSequence(i, np.arange(2, dtype=np.int32).tobytes(), 2, SamplingParams(), 0) for i in range(3)]
    live.apply([], new, [PageGrant(i, 0, 0, i) for i in range(3)])
    rows = DecodeRows(max_rows=3, max_pages=4, page_tokens=T, device=CPU)
    rows.arrange([Row(0, 1, 1, True)], [live[0]])
    rows.advance(torch.tensor([70, 71]), [live[0], live[1]])
    rows.arrange([Row(1, 2, 1, True), Row(2, 1, 1, True), Row(0, 2, 1, True)], [live[1], live[2], live[0]])
    assert [(token, position) for token, position, *_ in found(rows, 3, [1, 1, 1])] == [(71, 2), (1, 1), (70, 2)]
    rows.advance(torch.tensor([81, 82, 80]), [live[1], live[2], live[0]])
    rows.arrange([Row(0, 3, 1, True), Row(1, 3, 1, True)], [live[0], live[1]])
    assert [(token, position) for token, position, *_ in found(rows, 2, [1, 1])] == [(80, 3), (81, 3)]


def test_a_sequence_that_was_sent_away_and_starts_again_at_once_is_another_one():
    """Same id, same step, other pages: nothing of what the device had may stay."""
    live = LiveSequences(0, T)
    rows = DecodeRows(max_rows=2, max_pages=4, page_tokens=T, device=CPU)
    first = NewSequence(1, np.array([5, 6], np.int32).tobytes(), 2, SamplingParams(), 0)
    live.apply([], [first], [PageGrant(1, 0, 0, 3)])
    rows.arrange([Row(1, 1, 1, True)], [live[1]])
    rows.advance(torch.tensor([7]), [live[1]])
    again = NewSequence(1, np.array([5, 6, 7], np.int32).tobytes(), 2, SamplingParams(), 0)
    live.apply([1], [again], [PageGrant(1, 0, 0, 9)])
    rows.arrange([Row(1, 2, 1, True)], [live[1]])
    assert found(rows, 1, [1]) == [(7, 2, 2, 9, 2, 3, [9], [0])]


def test_no_rows_is_a_step_too():
    rows = DecodeRows(max_rows=2, max_pages=4, page_tokens=T, device=CPU)
    rows.arrange([], [])
    assert all(getattr(value, "shape", (0,))[0] == 0 for value in astuple(rows.inputs(0))[:5])
