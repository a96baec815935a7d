"""What the next step computes, and on which pages. Knows counts of tokens; not what a token means, nor who asked."""

from collections import deque

from leanserve.contracts.batch import Batch, Row, StepResult, step_checksum
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import RequestTooLongError
from leanserve.contracts.kv_sharding import KvSharding, PageGrant
from leanserve.engine.pages import PageAllocator
from leanserve.engine.prefix_cache import PageNamer
from leanserve.engine.prompt_shares import PromptShares
from leanserve.engine.sequence import TOKEN_ID_BYTES, Sequence, SequenceState

__all__ = ["Scheduler"]

_PAGES_NAMED_AT_ONCE = 64
"""A look-up that ends early has named so many pages too many at most: they need their names later anyway."""


class Scheduler:
    """Continuous batching, first come first served.

    Every step holds one row of each sequence that decodes; `PromptShares` deals the rest of the budget to prompts. A
    sequence is admitted, in order of arrival, when its whole prompt fits beside the next token of everybody. So:

    - Running sequences are older than waiting ones. Any number of them may be in the middle of their prompts.
    - Who is admitted gets at least one token of that step's budget, and so does everybody else who runs. So there are
      never more running sequences than tokens in the budget, and each that decodes has a row in every step.
    - What a prompt still lacks is kept from everybody younger. So the oldest never waits for a page, and is never sent
      away: it ends, and then another is the oldest.
    - When decoding runs out of pages, the youngest gives all of its pages back and waits at the head of the queue, to
      be computed again. It returns only when everybody has room to grow, twice as much each time it was sent away, so
      the number of times is logarithmic in the longest completion asked for.
    """

    def __init__(
        self, sharding: KvSharding, options: BatchOptions, max_context_tokens: int, *, prefix_cache: bool = True
    ) -> None:
        """`prefix_cache` must be off where keys depend on more than the tokens before them (`Rope.depends_on_length`):
        a page would then not fit every prompt that begins alike."""
        self.sharding = sharding
        self.options = options
        self.max_context_tokens = max_context_tokens
        self.preemptions = 0
        """Since start."""
        self.prefix_queried_tokens = 0
        """Since start: tokens of newly admitted prompts, if there is a prefix cache to look them up in."""
        self.prefix_hit_tokens = 0
        """Of them, those that it held."""
        self.step = 0
        """The newest step handed out; 0 before the first."""
        self._long_prefill_tokens = (
            options.max_batch_tokens // 2 if options.long_prefill_tokens is None else options.long_prefill_tokens
        )
        self._allocator = PageAllocator(sharding)
        self._namer = PageNamer() if prefix_cache else None
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        """By sequence id, the oldest first."""
        self._head_lacks_pages = False
        """The head of the queue did not fit or was sent away, and nobody has left since."""
        self._dropped: list[int] = []
        """Released since the last batch; the ranks do not know yet."""
        self._completed = (0, 0)
        """The newest completed step and its checksum."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def pages_used_per_rank(self) -> tuple[int, ...]:
        return self._allocator.used_per_rank

    @property
    def pages_cached_per_rank(self) -> tuple[int, ...]:
        """Pages that no sequence holds and the prefix cache keeps."""
        return self._allocator.idle_per_rank

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._dropped)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestTooLongError: it could not finish even alone.
        """
        limit = min(self.max_context_tokens, self.sharding.total_tokens)
        if sequence.max_total_tokens > limit:
            limit_is = "the longest context served" if limit == self.max_context_tokens else "all the KV cache holds"
            raise RequestTooLongError(
                f"the prompt has {sequence.num_prompt_tokens} tokens and max_tokens is {sequence.sampling.max_tokens}, "
                f"{sequence.max_total_tokens} together; {limit} is {limit_is}: shorten the prompt or lower max_tokens",
                param="prompt" if sequence.num_prompt_tokens >= limit else "max_tokens",
            )
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends, in whatever state. Its pages are free at once; the ranks hear of it in the next batch."""
        if sequence.state is SequenceState.RUNNING:
            self._release(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            self._head_lacks_pages = False
        sequence.state = SequenceState.FINISHED

    def next_batch(self) -> Batch | None:
        """The next step, or None when there is nothing to do or to tell. Costs O(rows + pages granted)."""
        grants: list[PageGrant] = []
        rows = self._decode_rows(grants)
        shares = PromptShares(self.options.max_batch_tokens - len(rows))
        self._add_running_prompts(shares)
        admitted = self._admit(shares, grants)
        rows += self._prefill_rows(shares, grants)
        if not rows and not self._dropped:
            return None
        self.step += 1
        dropped, self._dropped = self._dropped, []
        return Batch(self.step, dropped, [s.as_new() for s in admitted], grants, rows, *self._completed)

    def complete(self, batch: Batch, result: StepResult) -> list[tuple[Sequence, int]]:
        """Note that a batch is computed. Returns the sequences that got a token, with the token, in row order."""
        self._completed = (batch.step, step_checksum(result.step, result.token_ids))
        token_ids = iter(result.token_ids)
        sampled: list[tuple[Sequence, int]] = []
        for row in batch.rows:
            sequence = self._running[row.sequence_id]
            sequence.num_computed_tokens = row.start + row.count
            self._publish(sequence, row.start // self.sharding.page_tokens)
            if row.samples:
                sampled.append((sequence, next(token_ids)))
        return sampled

    def prefilling(self, batch: Batch) -> list[Sequence]:
        """The sequences that a completed batch left in the middle of their prompts."""
        return [self._running[row.sequence_id] for row in batch.rows if not row.samples]

    def _decode_rows(self, grants: list[PageGrant]) -> list[Row]:
        """One row for each running sequence that lacks nothing but its newest token, oldest first."""
        rows: list[Row] = []
        page_tokens = self.sharding.page_tokens
        kept_pages = 0
        for sequence in tuple(self._running.values()):
            if sequence.state is not SequenceState.RUNNING:
                break  # sent away by an older one in this very loop, and so are all that follow
            start = sequence.num_computed_tokens
            if sequence.num_tokens - start != 1:
                kept_pages += self._missing_pages(sequence)
                continue
            if start % page_tokens == 0:
                if not self._make_room_for(sequence, kept_pages):
                    break
                grants += self._grow(sequence, 1)
            rows.append(Row(sequence.id, start, 1, True))
        return rows

    def _add_running_prompts(self, shares: PromptShares) -> None:
        """What running sequences want of their prompts: no more than the pages hold that older ones leave.

        Decoding may have taken pages that an admitted prompt was counted to need. It then waits: those who took them
        are older, so they end and give pages back, or send it away.
        """
        free_pages = self._allocator.num_free
        for sequence in self._running.values():
            start = sequence.num_computed_tokens
            if sequence.num_tokens - start > 1:
                holdable_tokens = (sequence.pages.count + free_pages) * self.sharding.page_tokens
                wanted_tokens = min(sequence.num_tokens, holdable_tokens) - start
                if wanted_tokens:
                    shares.add(sequence, wanted_tokens)
                free_pages = max(free_pages - self._missing_pages(sequence), 0)

    def _admit(self, shares: PromptShares, grants: list[PageGrant]) -> list[Sequence]:
        """Take sequences off the queue while the head fits and there is a share of the step for it."""
        admitted: list[Sequence] = []
        room_tokens = needed_pages = 0
        while self._waiting and not self._head_lacks_pages and len(self._running) < self.options.max_sequences:
            sequence = self._waiting[0]
            cached = self._cached_pages(sequence)
            wanted_tokens = sequence.num_tokens - len(cached) * self.sharding.page_tokens
            is_long = wanted_tokens > self._long_prefill_tokens
            if not shares.has_room_for(wanted_tokens, is_long=is_long):
                break
            if room_tokens != self._room_tokens(sequence):
                room_tokens = self._room_tokens(sequence)
                needed_pages = sum(self._missing_pages(s, room_tokens) for s in self._running.values())
            new_pages = self._missing_pages(sequence, room_tokens) - len(cached)
            if needed_pages + new_pages + self._allocator.count_idle(cached) > self._allocator.num_free:
                self._head_lacks_pages = True
                break
            needed_pages += new_pages
            self._waiting.popleft()
            self._running[sequence.id] = sequence
            sequence.state = SequenceState.RUNNING
            sequence.num_computed_tokens = sequence.num_tokens - wanted_tokens
            sequence.is_long = is_long
            if sequence.cached_tokens is None:
                sequence.cached_tokens = sequence.num_computed_tokens
                if self._namer is not None:
                    self.prefix_queried_tokens += sequence.num_tokens
                    self.prefix_hit_tokens += sequence.num_computed_tokens
            grants += self._allocator.share(sequence.pages, cached)
            shares.add(sequence, wanted_tokens)
            admitted.append(sequence)
        return admitted

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        """The pages that a sequence can share."""
        numbers: list[int] = []
        if self._namer is not None:
            num_pages = sequence.max_cached_tokens // self.sharding.page_tokens
            for first in range(0, num_pages, _PAGES_NAMED_AT_ONCE):
                end = min(first + _PAGES_NAMED_AT_ONCE, num_pages)
                numbers += self._allocator.find(self._page_names(sequence, first, end, self._namer))
                if len(numbers) < end:
                    break
        return numbers

    def _publish(self, sequence: Sequence, first: int) -> None:
        """Let others share the pages from ordinal `first` on that are full and computed."""
        end = sequence.num_computed_tokens // self.sharding.page_tokens
        if self._namer is not None and first < end:
            for ordinal, name in enumerate(self._page_names(sequence, first, end, self._namer), first):
                self._allocator.publish(sequence.pages, ordinal, name)

    def _page_names(self, sequence: Sequence, first: int, end: int, namer: PageNamer) -> list[bytes]:
        """Names of a sequence's full pages with ordinals [first, end)."""
        names = sequence.page_names
        if len(names) < end:
            page_tokens = self.sharding.page_tokens
            parent = names[-1] if names else namer.root(sequence.sampling.cache_salt)
            token_ids = sequence.token_bytes(len(names) * page_tokens, end * page_tokens)
            names += namer.names(parent, token_ids, page_tokens * TOKEN_ID_BYTES)
        return names[first:end]

    def _room_tokens(self, sequence: Sequence) -> int:
        """By how many tokens everybody must be able to grow before `sequence` is admitted."""
        return self.sharding.page_tokens << sequence.preemptions if sequence.preemptions else 1

    def _missing_pages(self, sequence: Sequence, room_tokens: int = 0) -> int:
        """Pages that a sequence lacks to hold its tokens and `room_tokens` more, as far as it may grow at all."""
        end = min(sequence.num_tokens + room_tokens, sequence.max_total_tokens)
        return self.sharding.pages_for(end) - sequence.pages.count

    def _prefill_rows(self, shares: PromptShares, grants: list[PageGrant]) -> list[Row]:
        rows: list[Row] = []
        for sequence, count in shares.deal():
            start = sequence.num_computed_tokens
            end = start + count
            grants += self._grow(sequence, self.sharding.pages_for(end) - sequence.pages.count)
            rows.append(Row(sequence.id, start, count, end == sequence.num_tokens))
        return rows

    def _grow(self, sequence: Sequence, pages: int) -> list[PageGrant]:
        return self._allocator.grow(sequence.pages, pages, self.sharding.pages_for(sequence.max_total_tokens))

    def _make_room_for(self, sequence: Sequence, kept_pages: int) -> bool:
        """Free a page beside `kept_pages`, at the expense of the youngest. False if that was `sequence` itself."""
        while self._allocator.num_free <= kept_pages and sequence.state is SequenceState.RUNNING:
            youngest = next(reversed(self._running.values()))
            self._release(youngest)
            youngest.state = SequenceState.WAITING
            youngest.num_computed_tokens = 0
            youngest.preemptions += 1
            self.preemptions += 1
            self._waiting.appendleft(youngest)
            self._head_lacks_pages = True
        return sequence.state is SequenceState.RUNNING

    def _release(self, sequence: Sequence) -> None:
        """Take a running sequence's pages back, and note it for the ranks."""
        del self._running[sequence.id]
        self._head_lacks_pages = False
        self._allocator.release(sequence.pages)
        self._dropped.append(sequence.id)
