"""What a rank remembers of the live sequences: their tokens, and which of their pages it holds. Host memory, numpy."""

from dataclasses import dataclass, field

import numpy as np

from leanserve.contracts.batch import NewSequence
from leanserve.contracts.errors import EngineError
from leanserve.contracts.kv_sharding import PageGrant
from leanserve.contracts.sampling import SamplingParams

__all__ = ["LiveSequence", "LiveSequences"]


def _grown(array: np.ndarray, needed: int, fill: int = 0) -> np.ndarray:
    """`array`, or a copy at least twice as long, so that appending costs O(1) on average."""
    if needed <= len(array):
        return array
    longer = np.full(max(needed, 2 * len(array), 16), fill, dtype=array.dtype)
    longer[: len(array)] = array
    return longer


@dataclass(eq=False)
class LiveSequence:
    """One sequence as this rank sees it."""

    sampling: SamplingParams
    seed: int
    num_prompt_tokens: int
    num_tokens: int
    """Prompt and sampled tokens that every rank knows."""
    tokens: np.ndarray
    """int32, at least num_tokens long."""
    num_scored_tokens: int = 0
    """Of a request with prompt_logprobs: prompt tokens that have theirs from before a preemption."""
    num_pages: int = 0
    """Pages on this rank."""
    pages: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32: this rank's pages in order of position."""
    page_positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32: absolute position of each page's first token."""
    page_of_ordinal: np.ndarray = field(default_factory=lambda: np.full(0, -1, np.int32))
    """int32 by page ordinal over all ranks: this rank's page, or -1 where another rank holds it."""
    owner_of_ordinal: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 by page ordinal: the rank that holds the page."""

    def append_token(self, token_id: int) -> None:
        self.tokens = _grown(self.tokens, self.num_tokens + 1)
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    def positions_to_score(self, start: int, end: int) -> tuple[int, int]:
        """Of the positions [start, end), those whose next token is a prompt token that still wants its logprobs."""
        if self.sampling.prompt_logprobs is None:
            return start, start
        return max(start, self.num_scored_tokens - 1), min(end, self.num_prompt_tokens - 1)

    def grant(self, ordinal: int, owner: int, page: int | None, page_tokens: int) -> None:
        """Note a new page; `page` is None where another rank holds it."""
        self.owner_of_ordinal = _grown(self.owner_of_ordinal, ordinal + 1)
        self.page_of_ordinal = _grown(self.page_of_ordinal, ordinal + 1, fill=-1)
        self.owner_of_ordinal[ordinal] = owner
        if page is None:
            return
        self.page_of_ordinal[ordinal] = page
        self.pages = _grown(self.pages, self.num_pages + 1)
        self.page_positions = _grown(self.page_positions, self.num_pages + 1)
        self.pages[self.num_pages] = page
        self.page_positions[self.num_pages] = ordinal * page_tokens
        self.num_pages += 1

    def tokens_here(self, end: int, page_tokens: int) -> int:
        """Of the first `end` tokens, those in this rank's pages. Only the sequence's last page can be partly filled."""
        if self.num_pages == 0:
            return 0
        last_start = int(self.page_positions[self.num_pages - 1])
        return (self.num_pages - 1) * page_tokens + min(page_tokens, end - last_start)

    def page_at(self, positions: np.ndarray, page_tokens: int) -> np.ndarray:
        """This rank's page for each absolute position, -1 where another rank owns it."""
        return self.page_of_ordinal[positions // page_tokens]

    def owner_at(self, positions: np.ndarray, page_tokens: int) -> np.ndarray:
        """The rank that owns each absolute position."""
        return self.owner_of_ordinal[positions // page_tokens]


class LiveSequences:
    """The sequences of one rank by id. Applies the deltas of step messages, in their order."""

    def __init__(self, rank: int, page_tokens: int) -> None:
        self._rank = rank
        self._page_tokens = page_tokens
        self._by_id: dict[int, LiveSequence] = {}

    def __getitem__(self, sequence_id: int) -> LiveSequence:
        try:
            return self._by_id[sequence_id]
        except KeyError:
            raise EngineError(f"step names sequence {sequence_id}, which rank {self._rank} does not hold") from None

    def __len__(self) -> int:
        return len(self._by_id)

    def apply(self, dropped: list[int], started: list[NewSequence], grants: list[PageGrant]) -> None:
        for sequence_id in dropped:
            self._by_id.pop(sequence_id, None)
        for new in started:
            tokens = np.frombuffer(new.token_ids, dtype=np.int32)
            self._by_id[new.sequence_id] = LiveSequence(
                sampling=new.sampling,
                seed=new.seed,
                num_prompt_tokens=new.num_prompt_tokens,
                num_tokens=len(tokens),
                tokens=tokens.copy(),
                num_scored_tokens=new.num_scored_tokens,
            )
        for grant in grants:
            page = grant.page if grant.rank == self._rank else None
            self[grant.sequence_id].grant(grant.ordinal, grant.rank, page, self._page_tokens)
