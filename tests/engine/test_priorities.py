"""Who comes before whom: priorities, what waiting is worth, and who gives way."""

import pytest

from engine.workload import CheckedRun, toy_submit
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.engine.sequence import PRIORITY_STEP_S


def run_with(*pages_per_rank: int, budget: int = 64, max_sequences: int = 256) -> CheckedRun:
    options = BatchOptions(max_batch_tokens=budget, max_sequences=max_sequences)
    return CheckedRun(KvSharding(page_tokens=4, pages_per_rank=pages_per_rank), options)


def submit(run: CheckedRun, number: int, prompt_tokens: int, max_tokens: int, priority: int = 0) -> None:
    run.submit(toy_submit(number, prompt_tokens, max_tokens, priority=priority, ignore_eos=True))


def ends_in_turn(run: CheckedRun) -> list[str]:
    run.finish(max_steps=10_000)
    return list(run.ends)


def test_the_more_urgent_are_served_first_and_equals_in_order_of_arrival() -> None:
    run = run_with(40, max_sequences=1)
    submit(run, 0, 5, 3)
    run.step()
    for number, priority in enumerate((0, 1, -1, 0, -1, -20), 1):
        submit(run, number, 5, 3, priority)
    assert ends_in_turn(run) == ["r6", "r3", "r5", "r0", "r1", "r4", "r2"], "the first one gave way at once"


@pytest.mark.parametrize("waited_s", [PRIORITY_STEP_S - 1, PRIORITY_STEP_S + 1], ids=["too-short", "long-enough"])
def test_who_has_waited_long_enough_comes_before_the_more_urgent(waited_s: float) -> None:
    run = run_with(40, max_sequences=1)
    submit(run, 0, 5, 60, priority=-100)
    submit(run, 1, 5, 3, priority=1)
    for _ in range(int(waited_s)):
        run.step()
    submit(run, 2, 5, 3)
    assert ends_in_turn(run) == (["r0", "r1", "r2"] if waited_s > PRIORITY_STEP_S else ["r0", "r2", "r1"])


def test_urgent_requests_without_end_do_not_starve_another() -> None:
    run = run_with(40, max_sequences=1)
    submit(run, 0, 5, 3, priority=2)
    number = 0
    while "r0" not in run.ends:
        number += 1
        submit(run, number, 5, 3)
        run.step()
        run.step()
        run.step()
        assert run.scheduler.step < 200
    assert run.scheduler.step >= 2 * PRIORITY_STEP_S
    run.finish(max_steps=1000)


@pytest.mark.parametrize(("pages", "max_sequences"), [(16, 9), (90, 3)], ids=["pages", "sequences"])
def test_the_less_urgent_give_way_where_there_is_no_room(pages: int, max_sequences: int) -> None:
    run = run_with(pages, max_sequences=max_sequences)
    for number, priority in enumerate((1, 2, 1)):
        submit(run, number, 15, 30, priority)
    run.step()
    assert run.scheduler.num_running == 3
    submit(run, 3, 10, 2, priority=0)
    run.step()
    assert run.outputs["r3"], "it did not wait"
    assert run.scheduler.preemptions == 1
    assert 2 not in run.executor.sequences, "of those with the larger number"
    run.finish(max_steps=1000)


@pytest.mark.parametrize(
    ("running", "prompt_tokens"), [((0, 0), 10), ((0, 1), 30)], ids=["equals", "not-enough-to-be-had"]
)
def test_nobody_gives_way_in_vain_or_to_an_equal(running: tuple[int, ...], prompt_tokens: int) -> None:
    run = run_with(10)
    for number, priority in enumerate(running):
        submit(run, number, 15, 5, priority)
    run.step()
    submit(run, 9, prompt_tokens, 2)
    run.step()
    assert run.scheduler.preemptions == 0
    assert run.scheduler.num_waiting == 1
    run.finish(max_steps=1000)


@pytest.mark.parametrize(("prompt_tokens", "preemptions"), [(22, 1), (26, 0)], ids=["fits", "one-page-too-many"])
def test_what_a_victim_shares_with_the_urgent_one_is_not_counted_twice(prompt_tokens: int, preemptions: int) -> None:
    """Five pages are free, and the victim has five; of those the urgent one begins with four."""
    run = run_with(11)
    prefix = toy_submit(0, 16, 1).prompt_token_ids
    run.submit(toy_submit(0, 1, 9, ignore_eos=True))
    run.submit(toy_submit(1, 4, 9, behind=prefix, priority=1, ignore_eos=True))
    run.step()
    assert sum(run.scheduler.pages_used_per_rank) == 6
    run.submit(toy_submit(2, prompt_tokens, 1, behind=prefix, ignore_eos=True))
    run.step()
    assert run.scheduler.preemptions == preemptions
    run.finish(max_steps=1000)


def test_the_next_in_line_starts_when_one_that_did_not_fit_is_aborted() -> None:
    run = run_with(10)
    submit(run, 1, 20, 19)
    run.step()
    submit(run, 2, 30, 5)
    submit(run, 3, 3, 5)
    run.step()
    assert run.scheduler.num_waiting == 2, "the third would fit, but comes after the second"
    run.abort("r2")
    run.step()
    assert run.outputs["r3"]
    run.finish(max_steps=100)


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    """Sent away in the middle of its prompt, it finds its own pages: they were not cached when it was asked for."""
    run = run_with(16, budget=16)
    submit(run, 1, 40, 4, priority=1)
    run.step()
    run.step()
    assert run.executor.sequences[1].num_stored == 32
    submit(run, 2, 30, 2)
    run.step()
    assert 1 not in run.executor.sequences
    assert not run.outputs["r1"]
    run.finish(max_steps=100)
    assert run.executor.shared_tokens > 0
    assert run.cached_tokens["r1"] == 0
