import pytest

from engine.fake_executors import EchoExecutor
from engine.workload import CheckedRun, toy_submit
from leanserve.contracts.batch import Batch, Row
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import RequestTooLongError
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler


class Run:
    """An engine on an EchoExecutor that shows each step's batch."""

    def __init__(
        self, pages_per_rank: tuple[int, ...], *, page_tokens: int = 4, budget: int = 16, max_sequences: int = 8
    ) -> None:
        self.executor = EchoExecutor()
        self.scheduler = Scheduler(
            KvSharding(page_tokens=page_tokens, pages_per_rank=pages_per_rank),
            BatchOptions(max_batch_tokens=budget, max_sequences=max_sequences),
            max_context_tokens=1000,
        )
        self.engine = Engine(self.scheduler, self.executor, [])

    def submit(self, number: int, prompt_tokens: int, max_tokens: int) -> None:
        self.engine.submit(toy_submit(number, prompt_tokens, max_tokens))

    def step(self) -> Batch:
        self.engine.step()
        return self.executor.batches[-1]


def test_decode_rows_come_first_then_short_prompts_then_long_ones() -> None:
    run = Run((50, 50))
    run.submit(1, 3, 9)
    assert run.step().rows == [Row(1, 0, 3, True)]
    run.submit(2, 20, 9)
    run.submit(3, 5, 9)
    assert run.step().rows == [Row(1, 3, 1, True), Row(3, 0, 5, True), Row(2, 0, 10, False)]
    assert run.step().rows == [Row(1, 4, 1, True), Row(3, 5, 1, True), Row(2, 10, 10, True)]
    assert run.step().rows == [Row(1, 5, 1, True), Row(2, 20, 1, True), Row(3, 6, 1, True)]


def test_pages_are_granted_for_exactly_the_tokens_of_the_step() -> None:
    run = Run((50, 50))
    run.submit(1, 18, 9)
    assert [grant.ordinal for grant in run.step().grants] == [0, 1, 2, 3]
    assert [grant.ordinal for grant in run.step().grants] == [4]
    assert run.step().rows == [Row(1, 18, 1, True)]
    assert not run.executor.batches[-1].grants


def test_a_prompt_waits_until_all_of_it_and_one_token_fit() -> None:
    run = Run((4,), budget=100)
    run.submit(1, 7, 2)
    run.submit(2, 8, 2)  # two pages hold the prompt, and a third its next token; the first needs two
    run.submit(3, 1, 2)  # would fit, but came later
    assert [row.sequence_id for row in run.step().rows] == [1]
    assert [row.sequence_id for row in run.step().rows] == [1]
    assert [row.sequence_id for row in run.step().rows] == [2, 3]


def test_the_sequence_bound_holds() -> None:
    run = Run((50,), max_sequences=2)
    for number in range(1, 4):
        run.submit(number, 1, 3)
    assert [row.sequence_id for row in run.step().rows] == [1, 2]
    assert [row.sequence_id for row in run.step().rows] == [1, 2]
    assert [row.sequence_id for row in run.step().rows] == [1, 2]
    assert [row.sequence_id for row in run.step().rows] == [3]


def test_the_youngest_makes_room_and_starts_again_with_its_outputs() -> None:
    run = Run((4,), budget=100)
    run.submit(1, 7, 9)
    run.submit(2, 6, 5)
    batches = [run.step() for _ in range(10)]
    # Both prompts take two pages; the first one's ninth token needs a third.
    assert batches[2].dropped == [2]
    assert batches[2].rows == [Row(1, 8, 1, True)]
    restart = next(
        batch for batch in batches if any(new.sequence_id == 2 for new in batch.started[-1:]) and batch.step > 1
    )
    assert batches[restart.step - 2].step == 9, "it comes back when the first has ended"
    (new,) = restart.started
    assert new.num_prompt_tokens == 6
    assert len(new.token_ids) == 4 * (6 + 2)
    assert restart.rows == [Row(2, 0, 8, True)]
    assert run.scheduler.preemptions == 1


def test_the_ranks_hear_of_an_abort_when_nothing_is_left_to_compute() -> None:
    run = Run((9,))
    run.submit(1, 3, 9)
    run.step()
    run.engine.abort("r1")
    assert run.scheduler.pages_used_per_rank == (0,)
    assert run.engine.has_work
    batch = run.step()
    assert (batch.dropped, batch.rows, batch.step) == ([1], [], 2)
    assert not run.engine.has_work
    assert run.engine.step() == []
    assert len(run.executor.batches) == 2


def test_an_abort_in_the_queue_is_nobodys_business() -> None:
    run = Run((9,))
    run.submit(1, 3, 9)
    run.engine.abort("r1")
    assert not run.engine.has_work


@pytest.mark.parametrize(
    ("pages_per_rank", "max_context_tokens", "prompt_tokens", "max_tokens", "says", "param"),
    [
        (
            (3, 2),
            100,
            15,
            6,
            "the prompt has 15 tokens and max_tokens is 6, 21 together; 20 is all the KV cache holds",
            "max_tokens",
        ),
        (
            (30, 20),
            100,
            100,
            1,
            "the prompt has 100 tokens and max_tokens is 1, 101 together; 100 is the longest",
            "prompt",
        ),
    ],
    ids=["pool", "context"],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    pages_per_rank: tuple[int, ...],
    max_context_tokens: int,
    prompt_tokens: int,
    max_tokens: int,
    says: str,
    param: str,
) -> None:
    sharding = KvSharding(page_tokens=4, pages_per_rank=pages_per_rank)
    run = CheckedRun(sharding, BatchOptions(), max_context_tokens)
    with pytest.raises(RequestTooLongError, match=says) as refusal:
        run.engine.submit(toy_submit(1, prompt_tokens, max_tokens))
    assert refusal.value.param == param
    assert not run.engine.has_work
    assert run.submit(toy_submit(2, prompt_tokens - 1, max_tokens, ignore_eos=True))
    run.finish(max_steps=100)


def test_a_request_as_large_as_the_pool_is_served_in_its_turn() -> None:
    sharding = KvSharding(page_tokens=4, pages_per_rank=(5, 5))
    run = CheckedRun(sharding, BatchOptions(max_batch_tokens=8, max_sequences=4))
    for number in range(1, 4):
        run.submit(toy_submit(number, 9, 9, ignore_eos=True))
    run.submit(toy_submit(4, 20, 20, ignore_eos=True))
    while "r4" not in run.ends:
        # Newcomers that would fit never stop coming, and never pass.
        run.submit(toy_submit(100 + run.scheduler.step, 1, 1))
        assert run.scheduler.step < 100
        run.step()
    run.finish(max_steps=1000)


def test_preemption_does_not_thrash() -> None:
    """Forty that end one after the other, and a long prompt behind them.

    Whenever one ended there was room for the long prompt, and soon no more: admitted each time at once it would start
    six times. (That way tokens are computed 1.45 times; with a page of room for everybody 1.31 times.)
    """
    run = CheckedRun(KvSharding(page_tokens=4, pages_per_rank=(450,)), BatchOptions(max_sequences=64))
    requests = [toy_submit(number, 4, 80 + 2 * number, ignore_eos=True) for number in range(40)]
    requests.append(toy_submit(40, 200, 60, ignore_eos=True))
    for request in requests:
        run.submit(request)
    run.finish(max_steps=1000)
    assert run.scheduler.preemptions > 0
    assert run.starts[41] <= 3
    needed_tokens = sum(len(r.prompt_token_ids) // 4 + r.sampling.max_tokens - 1 for r in requests)
    assert run.executor.computed_tokens < 1.3 * needed_tokens


def test_a_preempted_sequence_about_to_fill_the_pool_comes_back() -> None:
    """The room it waits for is never more than it can grow."""
    run = CheckedRun(KvSharding(page_tokens=4, pages_per_rank=(10,)), BatchOptions())
    run.submit(toy_submit(1, 1, 8, ignore_eos=True))
    run.submit(toy_submit(2, 32, 8, ignore_eos=True))
    run.finish(max_steps=100)
    assert run.starts[2] == 2


def test_who_runs_keeps_room_for_its_next_token() -> None:
    run = Run((4,))
    run.submit(1, 7, 5)
    run.step()
    run.submit(2, 7, 5)  # needs two pages: free are two, but the first is about to need one of them
    assert [row.sequence_id for row in run.step().rows] == [1]
