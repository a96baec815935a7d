"""Requests for the toy model, and a run that checks every promise of the engine after every step."""

import math
import random
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec
import numpy as np

from engine.fake_executors import VOCAB_SIZE, ToyModelExecutor, toy_completion
from leanserve.contracts.batch import Batch, StepResult, StepTimes
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import RequestTooLongError
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Submit, TokenOutput
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler

EOS_TOKEN_ID = 0


def token_bytes(token_ids: list[int]) -> bytes:
    return np.array(token_ids, np.int32).tobytes()


def toy_submit(
    number: int,
    prompt_tokens: int,
    max_tokens: int,
    *,
    ignore_eos: bool = False,
    behind: bytes = b"",
    cache_salt: str | None = None,
    priority: int = 0,
) -> Submit:
    """A request of `prompt_tokens` random tokens behind those of `behind`; random for each number."""
    rng = random.Random(number)
    prompt = behind + token_bytes([rng.randrange(VOCAB_SIZE) for _ in range(prompt_tokens)])
    sampling = SamplingParams(
        max_tokens=max_tokens, seed=number, ignore_eos=ignore_eos, cache_salt=cache_salt, priority=priority
    )
    return Submit(f"r{number}", prompt, sampling)


@dataclass
class CheckedRun:
    """An engine on the toy model. `step()` fails the test when a promise of the scheduler is broken."""

    sharding: KvSharding
    options: BatchOptions
    max_context_tokens: int = 10_000
    prefix_cache: bool = True
    overlap: bool = False
    outputs: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, TokenOutput] = field(default_factory=dict)
    accepted: dict[str, Submit] = field(default_factory=dict)
    cached_tokens: dict[str, int] = field(default_factory=dict)
    """As told with each request's first token."""

    def __post_init__(self) -> None:
        self.executor = ToyModelExecutor(self.sharding)
        self.scheduler = Scheduler(self.sharding, self.options, self.max_context_tokens, prefix_cache=self.prefix_cache)
        self.engine = Engine(
            self.scheduler, self, [EOS_TOKEN_ID], clock=lambda: float(self.seconds), overlap=self.overlap
        )
        self.seconds = 0
        """One for each step."""
        self.orders: list[tuple[int, int]] = [(0, 0)]
        """By sequence id, what comes first sorts first. Sequence ids count accepted requests from 1."""
        self.starts: Counter[int] = Counter()
        """How often each sequence was started."""
        self.launched: deque[Batch] = deque()
        """Not collected, the oldest first."""
        self.sampled: list[list[int]] = [[]]
        """By sequence id, all that were collected: what the engine knows, and tells when its step returns."""
        self.owners: dict[int, list[int]] = {}
        """By sequence id: the ranks of its pages when its newest token was collected."""
        self.over: set[int] = set()
        """Sequences that have ended with those, or were aborted."""
        self.must_compute: set[int] = set()
        """Sequences that decode: each must have a row in the next batch, or be dropped by it."""
        self.long_steps = 0
        """Of more than max_batch_tokens."""
        self.step_s = 0.0
        """What a step is said to take."""

    def submit(self, request: Submit) -> bool:
        try:
            self.engine.submit(request)
        except RequestTooLongError:
            return False
        self.accepted[request.request_id] = request
        self.orders.append((self.seconds + 10 * request.sampling.priority, len(self.accepted)))
        self.outputs[request.request_id] = []
        self.sampled.append([])
        return True

    def abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        assert (output is None) == (request_id in self.ends or request_id not in self.accepted)
        if output is not None:
            assert output.finish_reason == "abort"
            self.over.add(1 + list(self.accepted).index(request_id))
            self._note(output)

    def text(self, request_id: str) -> bytes:
        """Prompt and outputs so far: what a next turn, or another try, begins with."""
        return self.accepted[request_id].prompt_token_ids + token_bytes(self.outputs[request_id])

    def serve(self, request: Submit, max_steps: int = 10_000) -> int:
        """Run until a request has ended. Returns how many of its prompt tokens were cached."""
        assert self.submit(request)
        for _ in range(max_steps):
            if request.request_id in self.ends:
                return self.cached_tokens[request.request_id]
            self.step()
        raise AssertionError(f"{request.request_id} still lives after {max_steps} steps")

    def step(self) -> None:
        self.seconds += 1
        for output in self.engine.step():
            self._note(output)
        assert self.scheduler.num_running <= min(self.options.max_sequences, self.options.max_batch_tokens)
        live = len(self.accepted) - len(self.ends)
        assert self.scheduler.num_running + self.scheduler.num_waiting == live

    def finish(self, max_steps: int) -> None:
        """Run until idle, and compare every output with the toy model run alone."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, f"requests still live after {max_steps} more steps"
        assert self.ends.keys() == self.accepted.keys()
        assert self.executor.used_per_rank == self.scheduler.pages_used_per_rank == (0,) * self.sharding.num_ranks
        most_pages = max((self.sharding.pages_for(r.sampling.max_tokens) for r in self.accepted.values()), default=1)
        most_starts = 2 + math.ceil(math.log2(most_pages))
        for sequence_id, starts in self.starts.items():
            assert starts <= most_starts + self._num_more_urgent(sequence_id), "preemption thrashes"
        for request_id, request in self.accepted.items():
            end_token_ids = frozenset() if request.sampling.ignore_eos else frozenset([EOS_TOKEN_ID])
            expected, reason = toy_completion(
                request.prompt_token_ids, request.sampling.seed or 0, request.sampling.max_tokens, end_token_ids
            )
            end = self.ends[request_id]
            if end.finish_reason == "abort":
                assert self.outputs[request_id] == expected[: len(self.outputs[request_id])]
            else:
                assert (self.outputs[request_id], end.finish_reason) == (expected, reason)

    def _note(self, output: TokenOutput) -> None:
        assert output.request_id not in self.ends, "more output after the last one"
        if output.token_ids and not self.outputs[output.request_id]:
            self.cached_tokens[output.request_id] = output.cached_tokens
            prompt_tokens = len(self.accepted[output.request_id].prompt_token_ids) // 4
            assert 0 <= output.cached_tokens < prompt_tokens
            owners = self.owners[1 + list(self.accepted).index(output.request_id)]
            assert array("H", output.page_owners).tolist() == owners[: self.sharding.pages_for(prompt_tokens)]
        else:
            assert output.cached_tokens == 0, "told twice"
            assert output.page_owners == b"", "told twice"
        self.outputs[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            assert output.error is None
            assert output.stop_token_id == (EOS_TOKEN_ID if output.finish_reason == "stop" else None)
            self.ends[output.request_id] = output

    def launch(self, batch: Batch) -> None:
        """The engine's executor is the toy model, and this run that looks at each batch first."""
        tokens = sum(row.count for row in batch.rows)
        assert tokens <= self.options.longest_step_tokens
        assert len({row.sequence_id for row in batch.rows}) == len(batch.rows)
        streams = self.must_compute - set(batch.dropped)
        if streams & {row.sequence_id for row in batch.rows}:
            assert tokens <= self.options.max_batch_tokens, "streams had to wait for a long step"
        self.long_steps += tokens > self.options.max_batch_tokens
        last_stream = max((i for i, row in enumerate(batch.rows) if row.sequence_id in streams), default=0)
        assert all(row.count == 1 and row.samples for row in batch.rows[:last_stream]), "decode rows come first"
        for new in batch.started:
            for passed in self._waiting_before(new.sequence_id, batch):
                assert self._follows(passed, batch), "a queue was jumped"
        for new in batch.started:
            self.starts[new.sequence_id] += 1
            rows = [row for row in batch.rows if row.sequence_id == new.sequence_id]
            assert len(rows) == 1, "started, and left without a token"
            assert new.sequence_id not in batch.dropped, "sent away and taken back in one step"
        preempted = [number for number in batch.dropped if number not in self.over]
        rows = {row.sequence_id for row in batch.rows}
        first_preempted = min((self.orders[number] for number in preempted), default=(math.inf, 0))
        assert all(self.orders[number] < first_preempted for number in rows), "somebody made room who comes before"
        complete = self._complete()
        running = rows | self.executor.sequences.keys() - set(batch.dropped) - complete
        assert not running or min(running, key=self.orders.__getitem__) in rows, "the first had to wait"
        self.launched.append(batch)
        self.executor.launch(batch)
        assert self.executor.used_per_rank == self.scheduler.pages_used_per_rank
        computed = {row.sequence_id for row in batch.rows}
        assert self.must_compute <= computed | set(batch.dropped) | complete, "a stream was left out of a step"
        assert not computed & complete, "a token was computed that nobody may have"
        sampled = {row.sequence_id for row in batch.rows if row.samples}
        self.must_compute = (self.must_compute - set(batch.dropped) - complete) | sampled

    def collect(self) -> StepResult:
        result = msgspec.structs.replace(self.executor.collect(), times=StepTimes(forward_s=self.step_s))
        rows = [row for row in self.launched.popleft().rows if row.samples]
        for row, token_id in zip(rows, result.token_ids, strict=True):
            if row.sequence_id not in self.over:
                sampling = self._request(row.sequence_id).sampling
                outputs = self.sampled[row.sequence_id]
                outputs.append(token_id)
                self.owners[row.sequence_id] = [rank for rank, _ in self.executor.sequences[row.sequence_id].table]
                if len(outputs) == sampling.max_tokens or (token_id == EOS_TOKEN_ID and not sampling.ignore_eos):
                    self.over.add(row.sequence_id)
        return result

    def _request(self, sequence_id: int) -> Submit:
        return list(self.accepted.values())[sequence_id - 1]

    def _known_text(self, sequence_id: int) -> bytes:
        return self._request(sequence_id).prompt_token_ids + token_bytes(self.sampled[sequence_id])

    def _complete(self) -> set[int]:
        """Sequences whose last token is sampled, by their max_tokens: where steps overlap, that is known before it."""
        return {
            number
            for number, sequence in self.executor.sequences.items()
            if len(sequence.token_ids) * 4
            == len(self._request(number).prompt_token_ids) + 4 * self._request(number).sampling.max_tokens
        }

    def _num_more_urgent(self, sequence_id: int) -> int:
        """Sequences for which this one may have had to give way, once for each."""
        priorities = [request.sampling.priority for request in self.accepted.values()]
        return sum(
            priority < priorities[sequence_id - 1] and self.orders[number] < self.orders[sequence_id]
            for number, priority in enumerate(priorities, 1)
        )

    def _waiting_before(self, sequence_id: int, batch: Batch) -> list[int]:
        """Sequences that come before this one and neither ended nor run."""
        started = {new.sequence_id for new in batch.started}
        running = self.executor.sequences.keys() - set(batch.dropped) | started
        live = [n for n in range(1, len(self.accepted) + 1) if n not in self.over]
        return [n for n in live if n not in running and self.orders[n] < self.orders[sequence_id]]

    def _follows(self, sequence_id: int, batch: Batch) -> bool:
        """Whether somebody who comes before has still to compute the next page that nobody else has."""
        text = self._known_text(sequence_id)[:-4]
        page_bytes = 4 * self.sharding.page_tokens
        for row in batch.rows:
            if self.orders[row.sequence_id] < self.orders[sequence_id]:
                page_end = (row.start // self.sharding.page_tokens + 1) * page_bytes
                other = self._known_text(row.sequence_id)
                if len(text) >= page_end and text[:page_end] == other[:page_end]:
                    return True
        return False
