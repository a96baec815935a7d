"""A step message -> device tensors: which tokens, at which positions, in which pages. Built once per step.

Shapes: N tokens that this rank computes: B decode rows, which every rank computes, then L of the Q prefill tokens.
"""

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch

from leanserve.attention.sharded_prefill import PrefillShare
from leanserve.attention.step import SequencePages, StepLayout
from leanserve.contracts.batch import Row
from leanserve.distributed.ranks import Ranks
from leanserve.worker.sequences import LiveSequence, LiveSequences

__all__ = ["SampledRows", "ScoredTokens", "StepInputs", "build_inputs"]


@dataclass(frozen=True)
class SampledRows:
    """Which hidden states give a next token."""

    sequence_ids: list[int]
    """In row order: decode rows, then prefill rows."""
    decode_rows: torch.Tensor
    """int64: rows of the N tokens; every rank has them."""
    prefill_owners: list[int]
    """The rank that has the hidden state of each sampling prefill row."""
    prefill_rows: torch.Tensor
    """int64: rows of the N tokens of the owner; 0 where this rank is not it."""


@dataclass(frozen=True)
class ScoredTokens:
    """Prompt tokens that get their log-probability in this step, each from the hidden state of the token before it."""

    rows_L: torch.Tensor
    """int64: rows of the N tokens, of those that this rank scores."""
    targets_L: torch.Tensor
    """int64: the tokens to score from them."""
    tokens_per_rank: tuple[int, ...]
    """L of each rank."""
    owners: np.ndarray
    """The rank of each token, over all ranks, in the order of the step's rows."""
    places: np.ndarray
    """Which of that rank's L it is."""
    spans: list[tuple[int, int, int]]
    """In the same order: sequence id, tokens, most likely tokens asked for."""
    num_top: int
    """The most that any of them asks for."""


@dataclass(frozen=True)
class StepInputs:
    """This rank's part of a step."""

    tokens_N: torch.Tensor
    """int64."""
    prompt_lengths_N: torch.Tensor
    """int64: tokens in the prompt of each token's sequence."""
    layout: StepLayout
    sampled: SampledRows
    scored: ScoredTokens | None
    """None where nobody asks for it."""


@dataclass(frozen=True)
class _Tokens:
    """Tokens of some rows, side by side, in host memory."""

    ids: np.ndarray
    positions: np.ndarray
    pages: np.ndarray
    owners: np.ndarray
    prompt_lengths: np.ndarray

    @classmethod
    def of(cls, rows: list[Row], sequences: list[LiveSequence], page_tokens: int) -> "_Tokens":
        spans = [np.arange(row.start, row.start + row.count, dtype=np.int32) for row in rows]
        columns = [
            [sequence.tokens[row.start : row.start + row.count] for row, sequence in zip(rows, sequences, strict=True)],
            spans,
            [sequence.page_at(span, page_tokens) for span, sequence in zip(spans, sequences, strict=True)],
            [sequence.owner_at(span, page_tokens) for span, sequence in zip(spans, sequences, strict=True)],
            [np.full(row.count, s.num_prompt_tokens, np.int32) for row, s in zip(rows, sequences, strict=True)],
        ]
        return cls(*(np.concatenate([np.zeros(0, np.int32), *column]) for column in columns))

    def only(self, chosen: np.ndarray) -> "_Tokens":
        return _Tokens(*(column[chosen] for column in vars(self).values()))

    def then(self, others: "_Tokens") -> "_Tokens":
        pairs = zip(vars(self).values(), vars(others).values(), strict=True)
        return _Tokens(*(np.concatenate(pair) for pair in pairs))


def build_inputs(rows: list[Row], live: LiveSequences, page_tokens: int, ranks: Ranks) -> StepInputs:
    """Lay out `rows` for this rank. The leading rows of one token go through decode, all others through prefill."""
    device = ranks.device
    sequences = [live[row.sequence_id] for row in rows]
    num_decode = sum(1 for _ in takewhile(lambda row: row.count == 1, rows))
    prefill_rows = rows[num_decode:]
    decode = _Tokens.of(rows[:num_decode], sequences[:num_decode], page_tokens)
    prefill = _Tokens.of(prefill_rows, sequences[num_decode:], page_tokens)
    tokens = decode.then(prefill.only(prefill.owners == ranks.rank))
    ends = np.cumsum([row.count for row in prefill_rows], dtype=np.int64)

    def to_device(array: np.ndarray, dtype: type = np.int32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype)).to(device, non_blocking=True)

    def sequence_pages(part: slice) -> SequencePages:
        return _sequence_pages(rows[part], sequences[part], page_tokens, device)

    share = None
    place = np.zeros(0, np.int64)
    if prefill_rows:
        place = _place_in_owner(prefill.owners, ranks.size)
        tokens_per_rank = np.bincount(prefill.owners, minlength=ranks.size)
        share = PrefillShare(
            q_offsets=to_device(np.concatenate([[0], ends])),
            positions_Q=to_device(prefill.positions),
            tokens_per_rank=tuple(tokens_per_rank.tolist()),
            padded_rows_Q=to_device(prefill.owners * tokens_per_rank.max() + place, np.int64),
            by_owner_Q=to_device(np.argsort(prefill.owners, kind="stable"), np.int64),
        )
        last = ends[[row.samples for row in prefill_rows]] - 1
        sampling_owners = prefill.owners[last]
        sampling_rows = np.where(sampling_owners == ranks.rank, num_decode + place[last], 0)
    else:
        sampling_owners = sampling_rows = np.zeros(0, np.int32)
    return StepInputs(
        tokens_N=to_device(tokens.ids, np.int64),
        prompt_lengths_N=to_device(tokens.prompt_lengths, np.int64),
        layout=StepLayout(
            positions_N=to_device(tokens.positions),
            pages_N=to_device(tokens.pages),
            slots_N=to_device(tokens.positions % page_tokens),
            decode=sequence_pages(slice(0, num_decode)),
            prefill=sequence_pages(slice(num_decode, None)),
            share=share,
        ),
        sampled=SampledRows(
            sequence_ids=[row.sequence_id for row in rows if row.samples],
            decode_rows=to_device(np.flatnonzero([row.samples for row in rows[:num_decode]]), np.int64),
            prefill_owners=sampling_owners.tolist(),
            prefill_rows=to_device(sampling_rows, np.int64),
        ),
        scored=_scored_tokens(rows, sequences, prefill.owners, num_decode + place, num_decode, ranks),
    )


def _scored_tokens(
    rows: list[Row],
    sequences: list[LiveSequence],
    prefill_owners: np.ndarray,
    prefill_places: np.ndarray,
    num_decode: int,
    ranks: Ranks,
) -> ScoredTokens | None:
    """`prefill_places`: of each prefill token, its row on the rank that owns it. Decode rows are scored by rank 0."""
    if all(sequence.sampling.prompt_logprobs is None for sequence in sequences):
        return None
    owners, local_rows, targets = ([np.zeros(0, np.int64)] for _ in range(3))
    spans: list[tuple[int, int, int]] = []
    row_place = 0  # among the prefill tokens
    for index, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        first, end = sequence.positions_to_score(row.start, row.start + row.count)
        if first < end:
            targets.append(sequence.tokens[first + 1 : end + 1])
            if index < num_decode:
                owners.append(np.zeros(1, np.int64))
                local_rows.append(np.array([index]))
            else:
                part = slice(row_place + first - row.start, row_place + end - row.start)
                owners.append(prefill_owners[part])
                local_rows.append(prefill_places[part])
            assert sequence.sampling.prompt_logprobs is not None
            spans.append((row.sequence_id, end - first, sequence.sampling.prompt_logprobs))
        row_place += row.count if index >= num_decode else 0
    if not spans:
        return None
    owner = np.concatenate(owners)
    mine = owner == ranks.rank
    return ScoredTokens(
        rows_L=torch.from_numpy(np.concatenate(local_rows)[mine]).to(ranks.device),
        targets_L=torch.from_numpy(np.concatenate(targets)[mine].astype(np.int64)).to(ranks.device),
        tokens_per_rank=tuple(np.bincount(owner, minlength=ranks.size).tolist()),
        owners=owner,
        places=_place_in_owner(owner, ranks.size),
        spans=spans,
        num_top=max(num_top for _, _, num_top in spans),
    )


def _place_in_owner(owners: np.ndarray, num_ranks: int) -> np.ndarray:
    """For each token, how many tokens before it have the same owner."""
    place = np.empty(len(owners), np.int64)
    for rank in range(num_ranks):
        mine = owners == rank
        place[mine] = np.arange(np.count_nonzero(mine))
    return place


def _sequence_pages(
    rows: list[Row], sequences: list[LiveSequence], page_tokens: int, device: torch.device
) -> SequencePages:
    widest = max((sequence.num_pages for sequence in sequences), default=0)
    page_table = np.zeros((len(rows), max(widest, 1)), np.int32)
    page_positions = np.zeros_like(page_table)
    lengths = np.empty(len(rows), np.int32)
    for b, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        page_table[b, : sequence.num_pages] = sequence.pages[: sequence.num_pages]
        page_positions[b, : sequence.num_pages] = sequence.page_positions[: sequence.num_pages]
        lengths[b] = sequence.tokens_here(row.start + row.count, page_tokens)
    return SequencePages(
        page_table_BM=torch.from_numpy(page_table).to(device, non_blocking=True),
        lengths_B=torch.from_numpy(lengths).to(device, non_blocking=True),
        page_positions_BM=torch.from_numpy(page_positions).to(device, non_blocking=True),
    )
