"""Executors for engine tests: each does what its name says."""

import threading
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts.batch import Batch, Row, StepResult, step_checksum
from leanserve.contracts.kv_sharding import KvSharding, PageGrant


class ImmediateExecutor:
    """Computes each batch when it is launched, with `compute`, and keeps the result until it is collected."""

    def __init__(self, compute: Callable[[Batch], StepResult]) -> None:
        self._compute = compute
        self.results: deque[StepResult] = deque()
        """Launched and not collected, the oldest first."""

    def launch(self, batch: Batch) -> None:
        self.results.append(self._compute(batch))

    def collect(self) -> StepResult:
        return self.results.popleft()


class EchoExecutor(ImmediateExecutor):
    """Samples each sequence's number for every sampling row, and remembers the batches."""

    def __init__(self) -> None:
        super().__init__(self.echo)
        self.batches: list[Batch] = []

    def echo(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        return StepResult(batch.step, [row.sequence_id for row in batch.rows if row.samples])


class RecordingExecutor(EchoExecutor):
    """Echoes, and notes in which order steps are launched and collected."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def launch(self, batch: Batch) -> None:
        self.calls.append(("launch", batch.step))
        super().launch(batch)

    def collect(self) -> StepResult:
        result = super().collect()
        self.calls.append(("collect", result.step))
        return result


class FailingExecutor(EchoExecutor):
    """Echoes, and raises `error` when step `at_step` is launched, or when it is collected."""

    def __init__(self, at_step: int, error: Exception, *, when_collected: bool = False) -> None:
        super().__init__()
        self.at_step = at_step
        self.error = error
        self.when_collected = when_collected

    def launch(self, batch: Batch) -> None:
        if batch.step == self.at_step and not self.when_collected:
            raise self.error
        super().launch(batch)

    def collect(self) -> StepResult:
        if self.results[0].step == self.at_step and self.when_collected:
            raise self.error
        return super().collect()


class HeldExecutor(EchoExecutor):
    """Echoes, and waits in step `at_step` until it may go on."""

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self.at_step = at_step
        self.is_held = threading.Event()
        self.go_on = threading.Event()

    def launch(self, batch: Batch) -> None:
        if batch.step == self.at_step:
            self.is_held.set()
            self.go_on.wait()
        super().launch(batch)


VOCAB_SIZE = 50


def toy_kv(token_ids: Iterable[int], kv_before: int = 0) -> list[int]:
    """The toy model's "KV" at each position: like a real one's it depends on this token and on all before it."""
    kv: list[int] = []
    for token_id in token_ids:
        kv_before = zlib.crc32(token_id.to_bytes(4, "little"), kv_before)
        kv.append(kv_before)
    return kv


def toy_token(kv: NDArray[np.uint32], seed: int) -> int:
    """The toy model's next token depends on the KV of every token before it, and on the seed."""
    return zlib.crc32(kv.tobytes(), seed & 0xFFFFFFFF) % VOCAB_SIZE


def toy_completion(
    prompt_token_ids: bytes, seed: int, max_tokens: int, end_token_ids: frozenset[int]
) -> tuple[list[int], str]:
    """What the toy model generates for one request alone, and why it ends."""
    kv = toy_kv(np.frombuffer(prompt_token_ids, np.int32).tolist())
    outputs: list[int] = []
    while len(outputs) < max_tokens:
        outputs.append(toy_token(np.array(kv, np.uint32), seed))
        kv += toy_kv(outputs[-1:], kv[-1])
        if outputs[-1] in end_token_ids:
            return outputs, "stop"
    return outputs, "length"


class _ToySequence:
    def __init__(self, token_ids: bytes, seed: int) -> None:
        self.token_ids: list[int] = np.frombuffer(token_ids, np.int32).tolist()
        self.seed = seed
        self.table: list[tuple[int, int]] = []
        self.num_stored = 0


class ToyModelExecutor(ImmediateExecutor):
    """The toy model on every rank's page pool: "KV" is stored in the granted pages and read from there.

    Asserts what a rank relies on: a page to be filled is nobody else's and within its rank's pool, ordinals are in
    order, a new sequence's row starts behind whole pages, and perhaps a copied one, that hold the very KV it would
    compute, any other row goes on where the last one ended, with pages enough and none to spare, steps come in order
    with the checksum of the newest that was collected. A page is poisoned when it is granted to be filled, so a stale
    page table changes the tokens.
    """

    POISON = 0xDEADBEEF

    def __init__(self, sharding: KvSharding) -> None:
        super().__init__(self.run)
        self.sharding = sharding
        self.pools = [
            np.full((pages, sharding.page_tokens), self.POISON, np.uint32) for pages in sharding.pages_per_rank
        ]
        self.holders: dict[tuple[int, int], set[int]] = {}
        """Sequences by page; a page without any is not in it."""
        self.sequences: dict[int, _ToySequence] = {}
        self.step = 0
        self.collected = (0, 0)
        """The newest step that was collected, and its checksum."""
        self.computed_tokens = 0
        """Over all steps, recomputation after preemptions included."""
        self.shared_tokens = 0
        """Over all starts: tokens that were there already."""

    @property
    def used_per_rank(self) -> tuple[int, ...]:
        used = [0] * self.sharding.num_ranks
        for rank, _ in self.holders:
            used[rank] += 1
        return tuple(used)

    def collect(self) -> StepResult:
        result = super().collect()
        self.collected = (result.step, step_checksum(result.step, result.token_ids))
        return result

    def run(self, batch: Batch) -> StepResult:
        assert (batch.checked_step, batch.checksum) == self.collected
        self.step += 1
        assert batch.step == self.step
        for sequence_id in batch.dropped:
            for place in self.sequences.pop(sequence_id).table:
                self.holders[place].remove(sequence_id)
                if not self.holders[place]:
                    del self.holders[place]
        for new in batch.started:
            assert new.sequence_id not in self.sequences
            self.sequences[new.sequence_id] = _ToySequence(new.token_ids, new.seed)
        row_starts = {row.sequence_id: row.start for row in batch.rows}
        sources = [self.pools[copy.rank][copy.source].copy() for copy in batch.copies]
        for grant in batch.grants:
            self._grant(grant, row_starts[grant.sequence_id])
        targets = {(copy.rank, copy.target): kv for copy, kv in zip(batch.copies, sources, strict=True)}
        assert len(targets) == len(batch.copies), "one page, two copies"
        for (rank, page), kv in targets.items():
            self.pools[rank][page] = kv
        for new in batch.started:
            self._share(self.sequences[new.sequence_id], row_starts[new.sequence_id], targets)
        return StepResult(self.step, [token for row in batch.rows if (token := self._next(row)) is not None])

    def _grant(self, grant: PageGrant, row_start: int) -> None:
        sequence, place = self.sequences[grant.sequence_id], (grant.rank, grant.page)
        assert 0 <= grant.page < self.sharding.pages_per_rank[grant.rank]
        assert grant.ordinal == len(sequence.table)
        if (grant.ordinal + 1) * self.sharding.page_tokens > row_start:
            assert place not in self.holders, f"page {grant.page} of rank {grant.rank} is taken"
            self.pools[grant.rank][grant.page] = self.POISON
        self.holders.setdefault(place, set()).add(grant.sequence_id)
        sequence.table.append(place)

    def _share(self, sequence: _ToySequence, num_tokens: int, copied: Container[tuple[int, int]]) -> None:
        whole_pages, copied_tokens = divmod(num_tokens, self.sharding.page_tokens)
        assert not copied_tokens or sequence.table[whole_pages] in copied, "only whole pages are shared"
        assert self._stored(sequence, num_tokens).tolist() == toy_kv(sequence.token_ids[:num_tokens])
        sequence.num_stored = num_tokens
        self.shared_tokens += num_tokens

    def _stored(self, sequence: _ToySequence, num_tokens: int) -> NDArray[np.uint32]:
        pages = [self.pools[rank][page] for rank, page in sequence.table]
        return np.concatenate([*pages, np.empty(0, np.uint32)])[:num_tokens]

    def _next(self, row: Row) -> int | None:
        sequence = self.sequences[row.sequence_id]
        end = row.start + row.count
        assert row.count >= 1
        assert row.start == sequence.num_stored
        assert len(sequence.table) == self.sharding.pages_for(end), "grants cover exactly this step's tokens"
        kv_before = int(self._stored(sequence, row.start)[-1]) if row.start else 0
        kv = toy_kv(sequence.token_ids[row.start : end], kv_before)
        for position, value in zip(range(row.start, end), kv, strict=True):
            place = sequence.table[position // self.sharding.page_tokens]
            assert self.holders[place] == {row.sequence_id}, "a page is written that others hold"
            self.pools[place[0]][place[1], position % self.sharding.page_tokens] = value
        sequence.num_stored = end
        self.computed_tokens += row.count
        assert row.samples == (end == len(sequence.token_ids))
        if not row.samples:
            return None
        token_id = toy_token(self._stored(sequence, end), sequence.seed)
        sequence.token_ids.append(token_id)
        return token_id
