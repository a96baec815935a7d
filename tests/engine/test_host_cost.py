"""What the engine costs the host: O(batch) per step and never O(context). Counted here; timed in the slow test."""

import gc
import sys
import time
import tracemalloc
from statistics import median

import pytest

from engine.fake_executors import EchoExecutor, ImmediateExecutor
from leanserve.contracts.batch import Batch, StepResult
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Submit, encode
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler

PAGE_TOKENS = 64
NUM_RANKS = 8


def crowd(num_sequences: int, prompt_tokens: int, *, overlap: bool) -> Engine:
    """An engine in which `num_sequences` sequences of `prompt_tokens` tokens decode."""
    pages_per_rank = num_sequences * (prompt_tokens // PAGE_TOKENS // NUM_RANKS + 8)
    scheduler = Scheduler(
        KvSharding(page_tokens=PAGE_TOKENS, pages_per_rank=(pages_per_rank,) * NUM_RANKS),
        BatchOptions(max_batch_tokens=2**20, max_sequences=num_sequences),
        max_context_tokens=prompt_tokens + 2000,
    )
    engine = Engine(scheduler, ImmediateExecutor(newest_batch_forgotten), [], overlap=overlap)
    prompt = bytes(4 * prompt_tokens)
    for number in range(num_sequences):
        engine.submit(Submit(str(number), prompt, SamplingParams(max_tokens=2000)))
    while len(engine.step()) < num_sequences:
        pass
    return engine


def newest_batch_forgotten(batch: Batch) -> StepResult:
    return StepResult(batch.step, [row.sequence_id for row in batch.rows if row.samples])


def calls_in(work) -> int:
    """Python and C functions called by `work`; not those that others have the garbage collector call."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])
def test_steps_cost_the_same_calls_and_memory_at_any_context(overlap: bool) -> None:
    calls = {}
    for prompt_tokens in (1024, 2**20):
        engine = crowd(8, prompt_tokens, overlap=overlap)
        for _ in range(PAGE_TOKENS):  # the first page behind what was shared is placed in its own way
            engine.step()
        # As many steps as a page has tokens, so that every sequence is granted one page, whenever it started.
        calls[prompt_tokens] = sum(calls_in(engine.step) for _ in range(PAGE_TOKENS))
        tracemalloc.start()
        for _ in range(PAGE_TOKENS):
            engine.step()
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 200_000
    assert calls[2**20] == calls[1024]


def test_admission_makes_no_list_of_a_long_prompt() -> None:
    executor = EchoExecutor()
    scheduler = Scheduler(KvSharding(page_tokens=64, pages_per_rank=(20_000,)), BatchOptions(), 2**20 + 16)
    engine = Engine(scheduler, executor, [])
    request = Submit("long", bytes(4 * 2**20), SamplingParams())
    tracemalloc.start()
    engine.submit(request)
    engine.step()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert executor.batches[0].started[0].token_ids is request.prompt_token_ids
    assert peak_bytes < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])
@pytest.mark.parametrize("prompt_tokens", [2**10, 2**20], ids=["1k", "1M"])
def test_time_of_a_step_of_256_sequences(prompt_tokens: int, overlap: bool, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    engine = crowd(256, prompt_tokens, overlap=overlap)
    us_per_page = 1e6 * (time.perf_counter() - start) / (256 * prompt_tokens / PAGE_TOKENS)
    steps_ms = []
    for _ in range(1000):
        start = time.perf_counter()
        outputs = engine.step()
        steps_ms.append(1e3 * (time.perf_counter() - start))
    start = time.perf_counter()
    encode(engine.report(outputs))
    encode_ms = 1e3 * (time.perf_counter() - start)
    steps_ms.sort()
    with capsys.disabled():
        print(
            f"\n256 sequences of {prompt_tokens} tokens on {NUM_RANKS} ranks: step {median(steps_ms):.3f} ms median, "
            f"{steps_ms[990]:.3f} ms p99; message {encode_ms:.3f} ms; prefill {us_per_page:.2f} us per page"
        )
    assert median(steps_ms) < 1


@pytest.mark.slow
def test_time_to_admit_a_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    executor = EchoExecutor()
    scheduler = Scheduler(KvSharding(page_tokens=64, pages_per_rank=(20_000,)), BatchOptions(), 2**20 + 16)
    engine = Engine(scheduler, executor, [])
    request = Submit("long", bytes(4 * 2**20), SamplingParams())
    start = time.perf_counter()
    engine.submit(request)
    engine.step()
    encode(executor.batches[0])
    admission_ms = 1e3 * (time.perf_counter() - start)
    with capsys.disabled():
        print(f"\na prompt of 2**20 tokens: {admission_ms:.2f} ms from submit to its first batch, encoded")
    assert admission_ms < 50
