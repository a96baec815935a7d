"""Executors for engine tests: each does what its name says."""

import zlib

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts.batch import Batch, Row, StepResult, step_checksum
from leanserve.contracts.kv_sharding import KvSharding


class EchoExecutor:
    """Samples each sequence's number for every sampling row, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        return StepResult(batch.step, [row.sequence_id for row in batch.rows if row.samples])


class FailingExecutor(EchoExecutor):
    """Echoes, and raises `error` at step `at_step`."""

    def __init__(self, at_step: int, error: Exception) -> None:
        super().__init__()
        self.at_step = at_step
        self.error = error

    def __call__(self, batch: Batch) -> StepResult:
        if batch.step == self.at_step:
            raise self.error
        return super().__call__(batch)


VOCAB_SIZE = 50


def toy_token(token_ids: NDArray[np.int32], seed: int) -> int:
    """The toy model: the next token depends on every token before it, on their order, and on the seed."""
    return zlib.crc32(token_ids.tobytes(), seed & 0xFFFFFFFF) % VOCAB_SIZE


def toy_completion(
    prompt_token_ids: bytes, seed: int, max_tokens: int, end_token_ids: frozenset[int]
) -> tuple[list[int], str]:
    """What the toy model generates for one request alone, and why it ends."""
    token_ids = np.frombuffer(prompt_token_ids, np.int32)
    outputs: list[int] = []
    while len(outputs) < max_tokens:
        outputs.append(toy_token(token_ids, seed))
        token_ids = np.append(token_ids, np.int32(outputs[-1]))
        if outputs[-1] in end_token_ids:
            return outputs, "stop"
    return outputs, "length"


class _ToySequence:
    def __init__(self, token_ids: bytes, seed: int) -> None:
        self.token_ids = np.frombuffer(token_ids, np.int32).tolist()
        self.seed = seed
        self.table: list[tuple[int, int]] = []
        self.num_stored = 0


class ToyModelExecutor:
    """The toy model on every rank's page pool: "KV" is the token id, stored in the granted pages and read from there.

    Asserts what a rank relies on: a granted page is free and within its rank's pool, ordinals are in order, a row goes
    on where the last one ended, with pages enough and none to spare, steps come in order with the right checksum.
    Free pages hold poison, so a stale page table changes the tokens.
    """

    POISON = -7

    def __init__(self, sharding: KvSharding) -> None:
        self.sharding = sharding
        self.pools = [
            np.full((pages, sharding.page_tokens), self.POISON, np.int32) for pages in sharding.pages_per_rank
        ]
        self.owner: dict[tuple[int, int], int] = {}
        self.sequences: dict[int, _ToySequence] = {}
        self.step = 0
        self.checksum = 0
        self.computed_tokens = 0
        """Over all steps, recomputation after preemptions included."""

    @property
    def used_per_rank(self) -> tuple[int, ...]:
        used = [0] * self.sharding.num_ranks
        for rank, _ in self.owner:
            used[rank] += 1
        return tuple(used)

    def __call__(self, batch: Batch) -> StepResult:
        assert (batch.checked_step, batch.checksum) == (self.step, self.checksum)
        self.step += 1
        assert batch.step == self.step
        for sequence_id in batch.dropped:
            for rank, page in self.sequences.pop(sequence_id).table:
                del self.owner[rank, page]
                self.pools[rank][page] = self.POISON
        for new in batch.started:
            assert new.sequence_id not in self.sequences
            self.sequences[new.sequence_id] = _ToySequence(new.token_ids, new.seed)
        for grant in batch.grants:
            sequence = self.sequences[grant.sequence_id]
            assert (grant.rank, grant.page) not in self.owner, f"page {grant.page} of rank {grant.rank} is taken"
            assert 0 <= grant.page < self.sharding.pages_per_rank[grant.rank]
            assert grant.ordinal == len(sequence.table)
            self.owner[grant.rank, grant.page] = grant.sequence_id
            sequence.table.append((grant.rank, grant.page))
        token_ids = [token for row in batch.rows if (token := self._compute(row)) is not None]
        self.checksum = step_checksum(self.step, token_ids)
        return StepResult(self.step, token_ids)

    def _compute(self, row: Row) -> int | None:
        sequence = self.sequences[row.sequence_id]
        end = row.start + row.count
        assert row.count >= 1
        assert row.start == sequence.num_stored
        assert len(sequence.table) == self.sharding.pages_for(end), "grants cover exactly this step's tokens"
        for position in range(row.start, end):
            rank, page = sequence.table[position // self.sharding.page_tokens]
            self.pools[rank][page, position % self.sharding.page_tokens] = sequence.token_ids[position]
        sequence.num_stored = end
        self.computed_tokens += row.count
        assert row.samples == (end == len(sequence.token_ids))
        if not row.samples:
            return None
        stored = np.concatenate([self.pools[rank][page] for rank, page in sequence.table])[:end]
        token_id = toy_token(stored, sequence.seed)
        sequence.token_ids.append(token_id)
        return token_id
