"""Random lives: arrivals, forks of earlier texts, lengths, priorities, aborts, and pools so small that sequences are
preempted and cached pages forgotten. `CheckedRun` checks them after every step."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.workload import CheckedRun, toy_submit
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding

shardings = st.builds(
    KvSharding,
    page_tokens=st.sampled_from([1, 2, 3, 8]),
    pages_per_rank=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum).map(tuple),
)
options = st.builds(
    lambda batch_tokens, more, sequences: BatchOptions(
        max_batch_tokens=batch_tokens, max_prefill_step_tokens=batch_tokens + more, max_sequences=sequences
    ),
    st.integers(1, 24),
    st.sampled_from([0, 7, 40]),
    st.integers(1, 6),
)
priorities = st.sampled_from([0, -1, 1, 1000])
arrivals = st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 24), priorities, st.booleans())
forks = st.tuples(
    st.just("fork"), st.integers(0, 40), st.integers(0, 60), st.integers(0, 9), st.integers(1, 24), priorities
)
aborts = st.tuples(st.just("abort"), st.integers(0, 40))
steps = st.tuples(st.just("step"), st.integers(1, 12), st.sampled_from([0.0, 2.0]))


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])
def test_every_request_ends_once_with_the_tokens_it_gets_alone(overlap: bool) -> None:
    steps_seen = long_steps_seen = 0

    @settings(max_examples=600)
    @given(shardings, options, st.lists(st.one_of(arrivals, forks, steps, aborts), min_size=8, max_size=40))
    def live(sharding: KvSharding, options: BatchOptions, events: list[tuple]) -> None:
        nonlocal steps_seen, long_steps_seen
        run = CheckedRun(sharding, options, overlap=overlap)
        for number, event in enumerate(events):
            if event[0] == "submit":
                _, prompt_tokens, max_tokens, priority, ignore_eos = event
                fits = prompt_tokens + max_tokens <= sharding.total_tokens
                request = toy_submit(number, prompt_tokens, max_tokens, priority=priority, ignore_eos=ignore_eos)
                assert run.submit(request) == fits
            elif event[0] == "fork":
                _, earlier, kept_tokens, prompt_tokens, max_tokens, priority = event
                behind = run.text(f"r{earlier}")[: 4 * kept_tokens] if f"r{earlier}" in run.accepted else b""
                prompt_tokens = prompt_tokens if behind else max(prompt_tokens, 1)
                run.submit(toy_submit(number, prompt_tokens, max_tokens, behind=behind, priority=priority))
            elif event[0] == "abort":
                run.abort(f"r{event[1]}")
            else:
                _, num_steps, run.step_s = event
                for _ in range(num_steps):
                    run.step()
        run.finish(max_steps=20_000)
        steps_seen += run.scheduler.step
        long_steps_seen += run.long_steps
        fill_every_page(run)

    live()
    assert steps_seen >= 10_000
    assert long_steps_seen >= 100


def fill_every_page(run: CheckedRun) -> None:
    """No page is lost: a request as large as all pools together is served, whatever is cached."""
    if run.sharding.total_tokens > 1:
        run.serve(toy_submit(999_999, run.sharding.total_tokens - 1, 1))


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])
@pytest.mark.parametrize(
    ("pages_per_rank", "page_tokens", "max_batch_tokens", "max_prefill_step_tokens", "max_sequences"),
    [
        ((40,), 4, 32, None, 16),
        ((9, 0, 14, 11), 4, 16, None, 16),
        ((5, 5, 5), 8, 7, None, 5),
        ((30, 30), 1, 64, None, 64),
        ((30, 30), 1, 9, 60, 64),
    ],
    ids=["one-rank", "uneven-with-an-empty-rank", "budget-7", "page-1", "long-steps"],
)
def test_a_long_crowded_life(
    pages_per_rank: tuple[int, ...],
    page_tokens: int,
    max_batch_tokens: int,
    max_prefill_step_tokens: int | None,
    max_sequences: int,
    overlap: bool,
) -> None:
    rng = random.Random(5)
    run = CheckedRun(
        KvSharding(page_tokens=page_tokens, pages_per_rank=pages_per_rank),
        BatchOptions(
            max_batch_tokens=max_batch_tokens,
            max_prefill_step_tokens=max_prefill_step_tokens,
            max_sequences=max_sequences,
        ),
        overlap=overlap,
    )
    number = 0
    while run.scheduler.step < 2500:
        while run.scheduler.num_waiting < 8:
            number += 1
            prompt_tokens = rng.randint(1, 30)
            fill = rng.random() < 0.1
            max_tokens = run.sharding.total_tokens - prompt_tokens if fill else rng.randint(1, 30)
            earlier = f"r{rng.randint(max(1, number - 20), number)}"
            forks = not fill and earlier in run.accepted and rng.random() < 0.5
            behind = run.text(earlier)[: 4 * rng.randint(0, 60)] if forks else b""
            salt = rng.choice([None, None, "salt"])
            run.submit(
                toy_submit(
                    number,
                    prompt_tokens,
                    max_tokens,
                    ignore_eos=rng.random() < 0.5,
                    behind=behind,
                    cache_salt=salt,
                    priority=rng.choice([0, 0, 0, 1, 5]),
                )
            )
        if rng.random() < 0.05:
            run.abort(f"r{rng.randint(max(1, number - 20), number)}")
        run.step()
    run.finish(max_steps=20_000)
    assert run.scheduler.preemptions > 20, "the pool was meant to be too small"
    assert (run.long_steps > 20) == (max_prefill_step_tokens is not None)
    assert run.executor.shared_tokens > run.executor.computed_tokens / 20, "texts were meant to begin alike"
    fill_every_page(run)
