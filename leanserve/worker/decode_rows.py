"""The sequences that decode, as a rank's device knows them: what stays there from one step to the next.

Row b is the step's b-th decode row. Its pages, position and newest token lie in buffers that are made once, so a step
uploads something only when a sequence joins, leaves or gets a page, and all else about the row is computed where it
lies. A captured graph finds its inputs in the same place at every replay. Knows nothing of models or sampling.

Shapes: S sequences that may decode at once, B of them do, J of these have just joined, L of these with a token that the
host does not know yet; M pages of one sequence on this rank; E new entries of page tables.
"""

from dataclasses import dataclass
from operator import is_

import numpy as np
import torch

from leanserve.attention.step import SequencePages
from leanserve.contracts.batch import Row
from leanserve.worker.sequences import LiveSequence
from leanserve.worker.transfers import upload

__all__ = ["DecodeInputs", "DecodeRows"]


@dataclass(frozen=True)
class DecodeInputs:
    """What a step reads of its decode rows, all of it on the device."""

    tokens_B: torch.Tensor
    """int64: the newest token of each."""
    positions_B: torch.Tensor
    """int32: that token's absolute position."""
    prompt_lengths_B: torch.Tensor
    """int32."""
    pages_B: torch.Tensor
    """int32: this rank's page for the token's key and value, or -1 where another rank owns it."""
    slots_B: torch.Tensor
    """int32: the slot inside that page."""
    sequence_pages: SequencePages


class DecodeRows:
    """The decode rows of one rank. A row that is not in use has no page: it attends to nothing and stores nothing.

    Args:
        max_rows: S.
        max_pages: M, as many pages as one sequence can have on this rank.
        page_tokens: tokens of a page.
    """

    def __init__(self, *, max_rows: int, max_pages: int, page_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._device = device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._page_table_SM = zeros(max_rows, max_pages)
        self._page_positions_SM = zeros(max_rows, max_pages)
        self._num_pages_S = zeros(max_rows)
        self._tokens_S = zeros(max_rows, dtype=torch.int64)
        self._positions_S = zeros(max_rows)
        self._prompt_lengths_S = zeros(max_rows)
        self._sequences: list[LiveSequence] = []
        """By row."""
        self._num_pages: list[int] = []
        """By row: the pages that the device knows of."""
        self._sampled: list[LiveSequence] = []
        """Who got a token in the newest step that gave any: the decode rows, then prompts that ended."""
        self._newest = torch.zeros(0, dtype=torch.int64, device=device)
        """Those tokens."""

    def arrange(self, rows: list[Row], sequences: list[LiveSequence]) -> None:
        """Make row b of the device that of rows[b], for all rows that decode in this step.

        What decoded in the step before is there already, its newest token included; who did not joins, with what the
        host knows. Where the host does not know its newest token yet, the step before sampled it, at the end of the
        prompt. O(B) on the host, O(pages) for who joins, and one upload at most.
        """
        stay = len(sequences) == len(self._sequences) and all(map(is_, sequences, self._sequences))
        num_pages = [sequence.num_pages for sequence in sequences]
        if stay and num_pages == self._num_pages:
            return
        row_before = {id(sequence): row for row, sequence in enumerate(self._sequences)}
        before = [row_before.get(id(sequence), -1) for sequence in sequences]
        known_pages = [0 if row < 0 else self._num_pages[row] for row in before]
        joined = [b for b, row in enumerate(before) if row < 0]
        grown = [b for b, known in enumerate(known_pages) if known < num_pages[b]]
        news = [slice(known_pages[b], num_pages[b]) for b in grown]
        late = [b for b in joined if rows[b].start >= sequences[b].num_tokens]
        place_of = {id(sequence): place for place, sequence in enumerate(self._sampled)} if late else {}
        parts = [
            [b if row < 0 else row for b, row in enumerate(before)],
            num_pages,
            joined,
            [0 if rows[b].start >= sequences[b].num_tokens else sequences[b].tokens[rows[b].start] for b in joined],
            [rows[b].start for b in joined],
            [sequences[b].num_prompt_tokens for b in joined],
            late,
            [place_of[id(sequences[b])] for b in late],
            np.repeat(grown, [new.stop - new.start for new in news]),
            _concatenate([np.arange(new.start, new.stop) for new in news]),
            _concatenate([sequences[b].pages[new] for b, new in zip(grown, news, strict=True)]),
            _concatenate([sequences[b].page_positions[new] for b, new in zip(grown, news, strict=True)]),
        ]
        from_B, num_pages_B, rows_J, tokens_J, positions_J, prompts_J, rows_L, places_L, *entries = self._upload(parts)
        rows_E, columns_E, pages_E, starts_E = entries
        if any(row not in (-1, b) for b, row in enumerate(before)):
            self._reorder(from_B.long(), widest=max(known_pages))
        self._num_pages_S.zero_()
        self._num_pages_S[: len(rows)] = num_pages_B
        if joined:
            self._tokens_S[rows_J.long()] = tokens_J.long()
            self._positions_S[rows_J.long()] = positions_J
            self._prompt_lengths_S[rows_J.long()] = prompts_J
        if late:
            self._tokens_S[rows_L.long()] = self._newest[places_L.long()]
        if grown:
            entries_E = (rows_E.long(), columns_E.long())
            self._page_table_SM[entries_E] = pages_E
            self._page_positions_SM[entries_E] = starts_E
        self._sequences, self._num_pages = sequences, num_pages

    def inputs(self, num_rows: int) -> DecodeInputs:
        """The first `num_rows` rows: views of the buffers, and what follows from them. Nothing is read by the host."""
        tokens, here = self._page_tokens, slice(num_rows)
        positions_B, num_pages_B = self._positions_S[here], self._num_pages_S[here]
        page_table_BM, page_positions_BM = self._page_table_SM[here], self._page_positions_SM[here]
        newest_B1 = (num_pages_B - 1).clamp_(min=0).long().unsqueeze(1)
        # Only the sequence's last page can be partly filled, and if this rank has it, the newest token is in there.
        in_newest_B = positions_B - page_positions_BM.gather(1, newest_B1).squeeze(1)
        elsewhere_B = (num_pages_B == 0) | (in_newest_B >= tokens)
        pages_B = page_table_BM.gather(1, newest_B1).squeeze(1).masked_fill_(elsewhere_B, -1)
        lengths_B = (num_pages_B - 1) * tokens + (in_newest_B + 1).clamp_(max=tokens)
        return DecodeInputs(
            tokens_B=self._tokens_S[here],
            positions_B=positions_B,
            prompt_lengths_B=self._prompt_lengths_S[here],
            pages_B=pages_B,
            slots_B=positions_B % tokens,
            sequence_pages=SequencePages(
                page_table_BM=page_table_BM,
                lengths_B=lengths_B.masked_fill_(num_pages_B == 0, 0),
                page_positions_BM=page_positions_BM,
            ),
        )

    def advance(self, tokens: torch.Tensor, sequences: list[LiveSequence]) -> None:
        """Every row has its next token, and after them come those of prompts that ended: int64, on the device, where
        the next step reads them."""
        here = slice(len(self._sequences))
        self._tokens_S[here] = tokens[here]
        self._positions_S[here] += 1
        self._newest, self._sampled = tokens, sequences

    def _reorder(self, from_B: torch.Tensor, *, widest: int) -> None:
        """Row b becomes what row from_B[b] was; of the page tables, their first `widest` columns."""
        here = slice(from_B.shape[0])
        for table_SM in (self._page_table_SM, self._page_positions_SM):
            table_SM[here, :widest] = table_SM[:, :widest].index_select(0, from_B)
        for column_S in (self._tokens_S, self._positions_S, self._prompt_lengths_S):
            column_S[here] = column_S.index_select(0, from_B)

    def _upload(self, parts: list[list[int] | np.ndarray]) -> tuple[torch.Tensor, ...]:
        """Integers as int32 on the device, all in one copy."""
        packed = np.concatenate([np.asarray(part, np.int32) for part in parts])
        return upload(packed, self._device).split([len(part) for part in parts])


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *arrays])
