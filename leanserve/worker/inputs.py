"""A step message -> device tensors: which tokens, at which positions, in which pages. Built once per step."""

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch

from leanserve.attention.step import SequencePages, StepLayout
from leanserve.contracts.batch import Row
from leanserve.worker.sequences import LiveSequence, LiveSequences

__all__ = ["StepInputs", "build_inputs"]


@dataclass(frozen=True)
class StepInputs:
    """N tokens of one step, decode rows first."""

    tokens_N: torch.Tensor
    """int64."""
    prompt_lengths_N: torch.Tensor
    """int64: tokens in the prompt of each token's sequence."""
    layout: StepLayout
    sampling_rows: torch.Tensor
    """int64 [M]: rows of the N tokens whose hidden state gives a next token, in row order."""
    sampled_ids: list[int]
    """Sequence id of each sampling row."""


def build_inputs(rows: list[Row], live: LiveSequences, page_tokens: int, device: torch.device) -> StepInputs:
    """Lay out `rows` for this rank. The leading rows of one token go through decode, all others through prefill."""
    sequences = [live[row.sequence_id] for row in rows]
    counts = np.fromiter((row.count for row in rows), np.int64, len(rows))
    ends = np.cumsum(counts)
    num_decode = sum(1 for _ in takewhile(lambda row: row.count == 1, rows))

    tokens = np.empty(int(ends[-1]), np.int64)
    positions = np.empty(int(ends[-1]), np.int32)
    pages = np.empty(int(ends[-1]), np.int32)
    for row, sequence, end in zip(rows, sequences, ends, strict=True):
        here = slice(int(end) - row.count, int(end))
        span = np.arange(row.start, row.start + row.count, dtype=np.int32)
        tokens[here] = sequence.tokens[row.start : row.start + row.count]
        positions[here] = span
        pages[here] = sequence.page_at(span, page_tokens)

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def sequence_pages(part: slice) -> SequencePages:
        return _sequence_pages(rows[part], sequences[part], page_tokens, device)

    return StepInputs(
        tokens_N=to_device(tokens),
        prompt_lengths_N=to_device(np.repeat([s.num_prompt_tokens for s in sequences], counts)),
        layout=StepLayout(
            positions_N=to_device(positions),
            pages_N=to_device(pages),
            slots_N=to_device(positions % page_tokens),
            decode=sequence_pages(slice(0, num_decode)),
            prefill=sequence_pages(slice(num_decode, None)),
            prefill_offsets=to_device(np.concatenate([[0], ends[num_decode:] - num_decode]).astype(np.int32)),
        ),
        sampling_rows=to_device(ends[[row.samples for row in rows]] - 1),
        sampled_ids=[row.sequence_id for row in rows if row.samples],
    )


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
