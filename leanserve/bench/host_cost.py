"""What the engine costs the host of rank 0 where nothing is computed: it must not grow with the context."""

import statistics
import time

import msgspec

from leanserve.contracts.batch import Batch, StepResult
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Submit, encode
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler

__all__ = ["HostCost", "measure_host_cost"]

PAGE_TOKENS, NUM_RANKS = 64, 8
SEQUENCES, STEPS = 256, 300
SHORT_TOKENS = 2**10


class HostCost(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds, of one core."""

    sequences: int
    step_ms: dict[int, float]
    """By context tokens of each sequence: the median step in which all of them decode, with its message encoded."""
    admission_ms: dict[int, float]
    """By prompt tokens: from submitting a prompt to its first step's batch, nothing being cached."""
    cached_admission_ms: dict[int, float]
    """The same where all of it is in the prefix cache: a look-up, and a grant for each page."""


def measure_host_cost(longest_tokens: int = 2**20) -> HostCost:
    """Takes a few seconds for a million tokens."""
    lengths = (longest_tokens // 4, longest_tokens)
    return HostCost(
        sequences=SEQUENCES,
        step_ms={tokens: _step_ms(tokens) for tokens in (SHORT_TOKENS, longest_tokens)},
        admission_ms={tokens: _admission_ms(tokens, cached=False) for tokens in lengths},
        cached_admission_ms={tokens: _admission_ms(tokens, cached=True) for tokens in lengths},
    )


class _NoExecutor:
    """Computes nothing: every token is 1."""

    def __init__(self) -> None:
        self.newest: Batch

    def launch(self, batch: Batch) -> None:
        self.newest = batch

    def collect(self) -> StepResult:
        return StepResult(self.newest.step, [1 for row in self.newest.rows if row.samples])


def _engine(num_pages: int, longest_tokens: int, options: BatchOptions) -> tuple[Engine, _NoExecutor]:
    sharding = KvSharding(page_tokens=PAGE_TOKENS, pages_per_rank=(-(-num_pages // NUM_RANKS),) * NUM_RANKS)
    executor = _NoExecutor()
    return Engine(Scheduler(sharding, options, longest_tokens), executor, ()), executor


def _submit(engine: Engine, name: str, tokens: int, max_tokens: int) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    engine.submit(Submit(name, bytes(4 * tokens), sampling))


def _step_ms(context_tokens: int) -> float:
    """The prompts are the same, so that pages for one of them and a few for each are enough."""
    options = BatchOptions(max_batch_tokens=max(context_tokens, SEQUENCES), max_sequences=SEQUENCES)
    engine, _ = _engine(context_tokens // PAGE_TOKENS + SEQUENCES * 16, context_tokens + 2 * STEPS, options)
    for number in range(SEQUENCES):
        _submit(engine, str(number), context_tokens, 2 * STEPS)
    while len(engine.step()) < SEQUENCES:
        pass
    steps_s = []
    for _ in range(STEPS):
        started = time.perf_counter()
        encode(engine.report(engine.step()))
        steps_s.append(time.perf_counter() - started)
    return round(statistics.median(steps_s) * 1e3, 3)


def _admission_ms(prompt_tokens: int, *, cached: bool) -> float:
    engine, executor = _engine(2 * prompt_tokens // PAGE_TOKENS + 99, prompt_tokens + 99, BatchOptions())
    if cached:
        _submit(engine, "first", prompt_tokens, 1)
        while engine.has_work:
            engine.step()
    started = time.perf_counter()
    _submit(engine, "measured", prompt_tokens, 9)
    engine.step()
    encode(executor.newest)
    return round((time.perf_counter() - started) * 1e3, 3)
