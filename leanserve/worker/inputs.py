"""A step's rows -> device tensors: which tokens, at which positions, in which pages. Built once per step.

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
from leanserve.distributed.token_exchange import TokenSpread
from leanserve.worker.decode_rows import DecodeInputs
from leanserve.worker.sequences import LiveSequence, LiveSequences
from leanserve.worker.transfers import upload

__all__ = ["PrefillSamples", "ScoredTokens", "StepInputs", "decode_inputs", "mixed_inputs", "split_rows"]


@dataclass(frozen=True)
class PrefillSamples:
    """Which hidden states of prefill tokens give a next token, in the order of the step's rows."""

    owners: torch.Tensor
    """int64: the rank that has each of them."""
    rows: torch.Tensor
    """int64: rows of the N tokens of the owner; 0 where this rank is not it."""


NO_SAMPLES = PrefillSamples(*[torch.zeros(0, dtype=torch.int64)] * 2)


@dataclass(frozen=True)
class ScoredTokens:
    """Prompt tokens that get their log-probability in this step, each from the hidden state of the token before it."""

    rows_L: torch.Tensor
    """int64: rows of the N tokens, of those hidden states that this rank has."""
    tokens_per_rank: tuple[int, ...]
    """L of each rank."""
    owners: torch.Tensor
    """int64: the rank of each hidden state, over all ranks, in the order of the step's rows."""
    places: torch.Tensor
    """int64: which of that rank's L it is."""
    targets: torch.Tensor
    """int64: the tokens to score from them."""
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
    """int32: tokens in the prompt of each token's sequence."""
    layout: StepLayout
    spread: TokenSpread
    prefill_samples: PrefillSamples
    scored: ScoredTokens | None = None
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


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Decode rows, which lead and have one token and sample the next one; and all others, which go through prefill."""
    num_decode = sum(1 for _ in takewhile(lambda row: row.count == 1 and row.samples, rows))
    return rows[:num_decode], rows[num_decode:]


def decode_inputs(decode: DecodeInputs, num_ranks: int) -> StepInputs:
    """A step of decode rows alone."""
    return StepInputs(
        tokens_N=decode.tokens_B,
        prompt_lengths_N=decode.prompt_lengths_B,
        layout=StepLayout(
            positions_N=decode.positions_B,
            pages_N=decode.pages_B,
            slots_N=decode.slots_B,
            decode=decode.sequence_pages,
            prefill=None,
            share=None,
        ),
        spread=TokenSpread(decode.tokens_B.shape[0], (0,) * num_ranks),
        prefill_samples=NO_SAMPLES,
    )


def mixed_inputs(
    decode: DecodeInputs, prefill_rows: list[Row], live: LiveSequences, page_tokens: int, ranks: Ranks
) -> StepInputs:
    """A step with prefill, beside decode rows if there are any: of the prefill tokens, those that this rank owns."""
    device, num_decode = ranks.device, decode.tokens_B.shape[0]
    sequences = [live[row.sequence_id] for row in prefill_rows]
    prefill = _Tokens.of(prefill_rows, sequences, page_tokens)
    mine = prefill.only(prefill.owners == ranks.rank)
    ends = np.cumsum([row.count for row in prefill_rows], dtype=np.int64)

    def to_device(array: np.ndarray, dtype: type = np.int32) -> torch.Tensor:
        return upload(array.astype(dtype), device)

    def behind(decode_B: torch.Tensor, prefill_L: np.ndarray) -> torch.Tensor:
        return torch.cat([decode_B, to_device(prefill_L).to(decode_B.dtype)])

    place = _place_in_owner(prefill.owners, ranks.size)
    tokens_per_rank = np.bincount(prefill.owners, minlength=ranks.size)
    spread = TokenSpread(num_decode, tuple(tokens_per_rank.tolist()))
    last = ends[[row.samples for row in prefill_rows]] - 1
    sampling_owners = prefill.owners[last]
    return StepInputs(
        tokens_N=behind(decode.tokens_B, mine.ids),
        prompt_lengths_N=behind(decode.prompt_lengths_B, mine.prompt_lengths),
        layout=StepLayout(
            positions_N=behind(decode.positions_B, mine.positions),
            pages_N=behind(decode.pages_B, mine.pages),
            slots_N=behind(decode.slots_B, mine.positions % page_tokens),
            decode=decode.sequence_pages if num_decode else None,
            prefill=_sequence_pages(prefill_rows, sequences, page_tokens, device),
            share=PrefillShare(
                q_offsets=to_device(np.concatenate([[0], ends])),
                positions_Q=to_device(prefill.positions),
                tokens_per_rank=spread.own_per_rank,
                padded_rows_Q=to_device(prefill.owners * tokens_per_rank.max() + place, np.int64),
                by_owner_Q=to_device(np.argsort(prefill.owners, kind="stable"), np.int64),
            ),
        ),
        spread=spread,
        prefill_samples=PrefillSamples(
            owners=to_device(sampling_owners, np.int64),
            rows=to_device(np.where(sampling_owners == ranks.rank, num_decode + place[last], 0), np.int64),
        ),
        scored=_scored_tokens(prefill_rows, sequences, prefill.owners, num_decode + place, ranks),
    )


def _scored_tokens(
    rows: list[Row], sequences: list[LiveSequence], owners_Q: np.ndarray, places_Q: np.ndarray, ranks: Ranks
) -> ScoredTokens | None:
    """`places_Q`: of each prefill token, its row on the rank that owns it. (A decode row's next token is no prompt
    token.)"""
    if all(sequence.sampling.prompt_logprobs is None for sequence in sequences):
        return None
    owners, local_rows, targets = ([np.zeros(0, np.int64)] for _ in range(3))
    spans: list[tuple[int, int, int]] = []
    row_place = 0
    for row, sequence in zip(rows, sequences, strict=True):
        first, end = sequence.positions_to_score(row.start, row.start + row.count)
        if first < end:
            part = slice(row_place + first - row.start, row_place + end - row.start)
            targets.append(sequence.tokens[first + 1 : end + 1])
            owners.append(owners_Q[part])
            local_rows.append(places_Q[part])
            assert sequence.sampling.prompt_logprobs is not None
            spans.append((row.sequence_id, end - first, sequence.sampling.prompt_logprobs))
        row_place += row.count
    if not spans:
        return None
    owner = np.concatenate(owners)
    mine = owner == ranks.rank

    def to_device(array: np.ndarray) -> torch.Tensor:
        return upload(array.astype(np.int64), ranks.device)

    return ScoredTokens(
        rows_L=to_device(np.concatenate(local_rows)[mine]),
        tokens_per_rank=tuple(np.bincount(owner, minlength=ranks.size).tolist()),
        owners=to_device(owner),
        places=to_device(_place_in_owner(owner, ranks.size)),
        targets=to_device(np.concatenate(targets)),
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
    # Two at least: for a table of one page the kernels are compiled once more (tuning.kernel_page_tokens).
    page_table = np.zeros((len(rows), max(widest, 2)), np.int32)
    page_positions = np.zeros_like(page_table)
    lengths = np.empty(len(rows), np.int32)
    for b, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        page_table[b, : sequence.num_pages] = sequence.pages[: sequence.num_pages]
        page_positions[b, : sequence.num_pages] = sequence.page_positions[: sequence.num_pages]
        lengths[b] = sequence.tokens_here(row.start + row.count, page_tokens)
    return SequencePages(
        page_table_BM=upload(page_table, device),
        lengths_B=upload(lengths, device),
        page_positions_BM=upload(page_positions, device),
    )
