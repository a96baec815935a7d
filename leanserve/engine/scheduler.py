"""What the next step computes, and on which pages. Knows counts of tokens; not what a token means, nor who asked."""

from leanserve.contracts.batch import Batch, Row, StepResult, step_checksum
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import RequestTooLongError
from leanserve.contracts.kv_sharding import KvSharding, PageCopy, PageGrant
from leanserve.engine.pages import PageAllocator
from leanserve.engine.prompt_shares import PromptShares
from leanserve.engine.reuse import PrefixReuse
from leanserve.engine.sequence import Sequence, SequenceState
from leanserve.engine.step_budget import StepBudget
from leanserve.engine.waiting import WaitingQueue

__all__ = ["Scheduler"]


class Scheduler:
    """Continuous batching, first come first served; a priority only shifts when somebody is taken to have come.

    Every step holds one row of each sequence that decodes; `PromptShares` deals the rest of its budget to prompts, and
    `StepBudget` says how much that is. A sequence is admitted, in order of arrival, when its whole prompt fits beside
    the next token of everybody. So:

    - Nobody is passed but by those more urgent, and while it follows: who would have to compute what an older one is
      just computing is set aside until that is there. Any number of sequences may be in the middle of their prompts.
    - Who is admitted gets at least one token of that step's budget, and so does everybody else who runs. There are
      never more running sequences than tokens in the smallest budget, so each that decodes has a row in every step.
    - What a prompt still lacks is kept from everybody younger. So the oldest never waits for a page, and is never sent
      away: it ends, and then another is the oldest.
    - When decoding runs out of pages, the last in order gives all of its pages back and waits, to be computed again.
      It returns only when everybody has room to grow, twice as much each time it was sent away, so the number of times
      is logarithmic in the longest completion asked for. Who is less urgent than the head of the queue gives way too,
      where the head can start for it.

    A step can be planned while the one before is in flight: all of the above needs counts of tokens, and who samples
    gets one more. Who turns out to have ended with it has a row too many, whose token means nothing. Its pages may be
    granted again at once: every rank computes steps in their order.
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
        self._max_running = min(options.max_sequences, options.max_batch_tokens)
        self._budget = StepBudget(options)
        self._allocator = PageAllocator(sharding)
        self._reuse = PrefixReuse(self._allocator, sharding.page_tokens, enabled=prefix_cache)
        self._waiting = WaitingQueue()
        self._running: dict[int, Sequence] = {}
        """By sequence id, in order."""
        self._stuck: Sequence | None = None
        """Who did not fit or was sent away, and cannot start before somebody leaves."""
        self._dropped: list[int] = []
        """Released since the last batch; the ranks do not know yet."""
        self._completed = (0, 0)
        """The newest completed step and its checksum."""

    @property
    def completed_step(self) -> int:
        """The newest step whose tokens are known; 0 before the first."""
        return self._completed[0]

    @property
    def must_know_tokens(self) -> bool:
        """Whether the tokens of the step in flight have to be known before the next one is planned. Costs O(running).

        - A grammar says what may follow only once it has read the newest token.
        - Somebody may have to be sent away: for lack of pages, or for the head of the queue. The step in flight may end
          another, so that nobody has to; and who is sent away starts again with all of its tokens.

        Nothing else needs them: positions and pages follow from counts, the devices keep each row's newest token where
        the next step reads it, and count there what is penalized.
        """
        if self._urgent_head() is not None:
            return True
        free_pages = self._allocator.num_free
        kept_pages = 0
        for sequence in self._running.values():
            if sequence.sampling.structured_outputs is not None and sequence.num_scheduled_tokens > sequence.num_tokens:
                return True
            if sequence.num_scheduled_tokens - sequence.num_computed_tokens != 1:
                kept_pages += self._missing_pages(sequence)
            elif sequence.num_computed_tokens % self.sharding.page_tokens == 0 and not sequence.is_all_scheduled:
                if free_pages <= kept_pages:
                    return True
                free_pages -= 1
        return False

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
        self._waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends, in whatever state. Its pages are free at once; the ranks hear of it in the next batch."""
        if sequence.state is SequenceState.RUNNING:
            self._release(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def withdraw(self, sequence: Sequence) -> None:
        """What a running sequence computed may be wrong: nobody is to find its pages any more."""
        self._reuse.withdraw(sequence)

    def next_batch(self) -> Batch | None:
        """The next step, to be launched now, or None when there is nothing to do or to tell. Costs O(rows + pages
        granted). While a step is in flight, `must_know_tokens` has to be false."""
        grants: list[PageGrant] = []
        copies: list[PageCopy] = []
        self._waiting.rejoin(self._still_follows)
        self._give_way_to_urgent()
        rows = self._decode_rows(grants)
        shares = PromptShares(self._budget.tokens(len(rows)) - len(rows))
        self._add_running_prompts(shares)
        admitted = self._admit(shares, grants, copies)
        rows += self._prefill_rows(shares, grants)
        if not rows and not self._dropped:
            return None
        self.step += 1
        started = [sequence.as_new() for sequence in admitted]
        for row in rows:
            self._note_launch(row)
        dropped, self._dropped = self._dropped, []
        return Batch(self.step, dropped, started, grants, copies, rows, *self._completed)

    def complete(self, batch: Batch, result: StepResult) -> list[tuple[int, Sequence, int]]:
        """Note that the oldest batch in flight is computed.

        Returns:
            (place in the result's tokens, sequence, token) for those that run still, in row order.
        """
        self._completed = (batch.step, step_checksum(result.step, result.token_ids))
        self._budget.note(sum(row.count for row in batch.rows), result.times.forward_s + result.times.sample_s)
        sampled = zip((row for row in batch.rows if row.samples), result.token_ids, strict=True)
        return [
            (place, self._running[row.sequence_id], token_id)
            for place, (row, token_id) in enumerate(sampled)
            if row.sequence_id in self._running
        ]

    def prompt_page_owners(self, sequence: Sequence) -> bytes:
        """The ranks that hold the prompt of a running sequence, page by page, as uint16 in native byte order."""
        return self._allocator.owners(sequence.pages, self.sharding.pages_for(sequence.num_prompt_tokens))

    def prefilling(self, batch: Batch) -> list[tuple[Sequence, Row]]:
        """The sequences that a completed batch left in the middle of their prompts, with their rows."""
        rows = [row for row in batch.rows if not row.samples]
        return [(self._running[row.sequence_id], row) for row in rows if row.sequence_id in self._running]

    def _note_launch(self, row: Row) -> None:
        sequence = self._running[row.sequence_id]
        sequence.num_computed_tokens = row.start + row.count
        sequence.num_scheduled_tokens += row.samples
        self._reuse.note(sequence, self.step)

    def _decode_rows(self, grants: list[PageGrant]) -> list[Row]:
        """One row for each running sequence that lacks nothing but its newest token, in order."""
        rows: list[Row] = []
        page_tokens = self.sharding.page_tokens
        kept_pages = 0
        for sequence in tuple(self._running.values()):
            if sequence.state is not SequenceState.RUNNING:
                break  # sent away by an earlier one in this very loop, and so are all that follow
            start = sequence.num_computed_tokens
            if sequence.num_scheduled_tokens - start != 1:
                kept_pages += self._missing_pages(sequence)
                continue
            if sequence.is_all_scheduled:
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
            if sequence.num_scheduled_tokens - start > 1:
                holdable_tokens = (sequence.pages.count + free_pages) * self.sharding.page_tokens
                wanted_tokens = min(sequence.num_tokens, holdable_tokens) - start
                if wanted_tokens:
                    shares.add(sequence, wanted_tokens)
                free_pages = max(free_pages - self._missing_pages(sequence), 0)

    def _admit(self, shares: PromptShares, grants: list[PageGrant], copies: list[PageCopy]) -> list[Sequence]:
        """Take sequences off the queue while the head fits and there is a share of the step for it."""
        admitted: list[Sequence] = []
        room_tokens = needed_pages = 0
        while (sequence := self._waiting.head) is not None and sequence is not self._stuck:
            if len(self._running) >= self._max_running:
                break
            cached = self._reuse.find(sequence)
            wanted_tokens = sequence.num_tokens - len(cached.pages) * self.sharding.page_tokens
            sequence.is_long = wanted_tokens > self._long_prefill_tokens
            leader = None if sequence.has_followed else self._reuse.leader_of(sequence, cached, self.step + 1)
            if leader is not None:
                sequence.has_followed = not sequence.is_long
                self._waiting.set_aside(leader)
                continue
            if not shares.has_room_for(wanted_tokens, is_long=sequence.is_long):
                break
            if room_tokens != self._room_tokens(sequence):
                room_tokens = self._room_tokens(sequence)
                needed_pages = sum(self._missing_pages(s, room_tokens) for s in self._running.values())
            new_pages = self._missing_pages(sequence, room_tokens) - len(cached.pages)
            if needed_pages + new_pages + self._allocator.count_idle(cached.pages) > self._allocator.num_free:
                self._stuck = sequence
                break
            needed_pages += new_pages
            self._waiting.remove(sequence)
            expected_pages = self.sharding.pages_for(sequence.max_total_tokens)
            wanted_tokens -= self._reuse.take_over(sequence, cached, expected_pages, grants, copies)
            self._start(sequence, sequence.num_tokens - wanted_tokens)
            shares.add(sequence, wanted_tokens)
            admitted.append(sequence)
        return admitted

    def _start(self, sequence: Sequence, computed_tokens: int) -> None:
        last = next(reversed(self._running.values()), None)
        self._running[sequence.id] = sequence
        if last is not None and last.order > sequence.order:
            self._running = dict(sorted(self._running.items(), key=lambda item: item[1].order))
        sequence.state = SequenceState.RUNNING
        sequence.num_computed_tokens = computed_tokens
        self._reuse.start(sequence, self.step + 1)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = computed_tokens
            if self._reuse.enabled:
                self.prefix_queried_tokens += sequence.num_tokens
                self.prefix_hit_tokens += computed_tokens

    def _give_way_to_urgent(self) -> None:
        """Send less urgent sequences away, the last first, where the head of the queue can start for it."""
        head = self._urgent_head()
        if head is None or self.step > self.completed_step:  # a follower that has just rejoined the queue waits a step
            return
        running = list(self._running.values())
        cached = self._reuse.find(head)
        if not head.has_followed and self._reuse.leader_of(head, cached, self.step + 1) is not None:
            return
        kept = frozenset(cached.pages)
        room_tokens = self._room_tokens(head)
        needed_pages = sum(self._missing_pages(s, room_tokens) for s in (*running, head))
        needed_pages += self._allocator.count_idle(cached.pages) - len(cached.pages)
        free_pages = self._allocator.num_free
        most_running = self._max_running - 1
        leaving: list[Sequence] = []
        while (needed_pages > free_pages or len(running) > most_running) and running and _gives_way(running[-1], head):
            leaving.append(running.pop())
            needed_pages -= self._missing_pages(leaving[-1], room_tokens)
            free_pages += self._allocator.count_releasable(leaving[-1].pages, kept)
        if needed_pages <= free_pages and len(running) <= most_running:
            for sequence in leaving:
                self._send_away(sequence)

    def _urgent_head(self) -> Sequence | None:
        """The head of the queue, where the last in order would give way to it."""
        head = self._waiting.head
        last = next(reversed(self._running.values()), None)
        if head is None or head is self._stuck or last is None or not _gives_way(last, head):
            return None
        return head

    def _room_tokens(self, sequence: Sequence) -> int:
        """By how many tokens everybody must be able to grow before `sequence` is admitted."""
        return self.sharding.page_tokens << sequence.preemptions if sequence.preemptions else 1

    def _missing_pages(self, sequence: Sequence, room_tokens: int = 0) -> int:
        """Pages that a sequence lacks to hold its tokens and `room_tokens` more, as far as it may grow at all."""
        end = min(sequence.num_scheduled_tokens + room_tokens, sequence.max_total_tokens)
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
            self._send_away(next(reversed(self._running.values())))
        return sequence.state is SequenceState.RUNNING

    def _send_away(self, sequence: Sequence) -> None:
        """A running sequence gives its pages back and waits, to be computed again."""
        assert sequence.num_scheduled_tokens == sequence.num_tokens, "sent away with a token in flight"
        self._release(sequence)
        sequence.state = SequenceState.WAITING
        sequence.num_computed_tokens = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self._waiting.add(sequence)
        self._stuck = sequence

    def _still_follows(self, follower: Sequence, leader: Sequence) -> bool:
        """A short prompt stays aside for one step, a long one while its leader completes a page of both in each."""
        return follower.is_long and self._reuse.leads(leader, follower, self.step + 1)

    def _release(self, sequence: Sequence) -> None:
        """Take a running sequence's pages back, and note it for the ranks."""
        del self._running[sequence.id]
        self._stuck = None
        self._reuse.leave(sequence)
        self._allocator.release(sequence.pages)
        self._dropped.append(sequence.id)


def _gives_way(running: Sequence, waiting: Sequence) -> bool:
    """Whether a running sequence is less urgent, and has not grown old enough to make up for that."""
    return running.sampling.priority > waiting.sampling.priority and running.order > waiting.order
