"""Long prompts, short prompts and streams in the same steps: nobody waits for long, and nobody for ever."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.fake_executors import EchoExecutor
from engine.workload import CheckedRun, toy_submit
from leanserve.contracts.batch import Batch
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import ConfigError
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine
from leanserve.engine.prompt_shares import PromptShares
from leanserve.engine.scheduler import Scheduler
from leanserve.engine.sequence import Sequence

BUDGET = 2048
ONE_LIMIT = BatchOptions(max_batch_tokens=BUDGET)
LONG_STEPS = BatchOptions(max_batch_tokens=BUDGET, max_prefill_step_tokens=4 * BUDGET)
"""Computed in no time, as the fake executors say, they double until they are as long as they may be."""


class Clock:
    """An engine with room for everybody. Time is counted in steps; every step's tokens are noted."""

    def __init__(self, options: BatchOptions = ONE_LIMIT) -> None:
        self.executor = EchoExecutor()
        sharding = KvSharding(page_tokens=64, pages_per_rank=(20_000, 20_000))
        scheduler = Scheduler(sharding, options, max_context_tokens=2**20)
        self.engine = Engine(scheduler, self.executor, [])
        self.now = 0
        self.token_times: dict[str, list[int]] = {}

    def submit(self, number: int, prompt_tokens: int, max_tokens: int) -> None:
        self.token_times[f"r{number}"] = []
        self.engine.submit(toy_submit(number, prompt_tokens, max_tokens))

    def step(self, steps: int = 1) -> Batch:
        for _ in range(steps):
            self.now += 1
            for output in self.engine.step():
                self.token_times[output.request_id].append(self.now)
        return self.executor.batches[-1]

    def rows(self) -> dict[int, int]:
        """Tokens of each sequence in the newest step."""
        return {row.sequence_id: row.count for row in self.executor.batches[-1].rows}


@pytest.mark.parametrize("num_long", [1, 3, 20], ids="{}-long".format)
def test_a_short_request_behind_long_prefills_starts_within_two_steps(num_long: int) -> None:
    clock = Clock()
    for number in range(4):
        clock.submit(number, 10, 500)
    clock.step(2)
    for number in range(num_long):
        clock.submit(100 + number, 65_536, 4)
    clock.step(3)
    arrivals = range(200, 212)
    for number in arrivals:
        asked_at = clock.now
        clock.submit(number, 100, 3)
        clock.step(2)
        assert clock.token_times[f"r{number}"][0] <= asked_at + 2
    assert not clock.token_times["r100"], "the long prompt was being computed all the while"
    for number in [*range(4), *arrivals]:
        times = clock.token_times[f"r{number}"]
        assert {later - sooner for sooner, later in pairwise(times)} == {1}, "a stream missed a step"


SECONDS_A_TOKEN = 0.001
CHUNK_S = BUDGET * SECONDS_A_TOKEN
"""What a full step takes."""


class SecondsClock(Clock):
    """A step moves it by the tokens it holds."""

    def __init__(self, options: BatchOptions) -> None:
        super().__init__(options)
        self.now_s = 0.0
        self.token_s: dict[str, list[float]] = {}

    def step_s(self) -> float:
        """Do a step. Returns what it took."""
        held = len(self.executor.batches)
        outputs = self.engine.step()
        took_s = SECONDS_A_TOKEN * sum(row.count for batch in self.executor.batches[held:] for row in batch.rows)
        self.now_s += took_s
        for output in outputs:
            self.token_s.setdefault(output.request_id, []).append(self.now_s)
        return took_s

    def longest_gap_s(self, request_id: str) -> float:
        return max(later - sooner for sooner, later in pairwise(self.token_s[request_id]))


@pytest.mark.parametrize("options", [ONE_LIMIT, LONG_STEPS], ids=["one-limit", "long-steps"])
@pytest.mark.parametrize("into_the_step", [0.001, 0.5, 0.999])
def test_beside_a_64k_prefill_a_short_request_and_the_streams_wait_for_a_chunk_or_two(
    into_the_step: float, options: BatchOptions
) -> None:
    """The short request comes while a step is being computed."""
    clock = SecondsClock(options)
    for number in range(16):
        clock.submit(number, 10, 1000)
    clock.step_s()
    clock.submit(100, 65_536, 2)
    number = 200
    while "r100" not in clock.token_s:
        asked_s = clock.now_s + into_the_step * clock.step_s()  # the step that runs when it comes
        clock.submit(number, 100, 3)
        if "r100" in clock.token_s:
            break
        clock.step_s()
        assert clock.token_s[f"r{number}"][0] - asked_s <= 2 * CHUNK_S
        number += 1
    assert number > 214, "the prefill was running all the while"
    for streamed in range(16):
        assert clock.longest_gap_s(f"r{streamed}") <= CHUNK_S + 1e-9


@pytest.mark.parametrize("into_the_step", [0.001, 0.5, 0.999])
def test_behind_a_lone_prefill_a_short_request_waits_for_two_of_its_longer_steps(into_the_step: float) -> None:
    """And once it streams, for no more than a chunk."""
    clock = SecondsClock(LONG_STEPS)
    clock.submit(100, 2**17, 2)
    for _ in range(2):
        clock.step_s()
    number = 200
    while "r100" not in clock.token_s:
        long_step_s = clock.step_s()
        asked_s = clock.now_s - (1 - into_the_step) * long_step_s
        if "r100" in clock.token_s:
            break
        assert long_step_s == 4 * CHUNK_S, "nobody streams"
        clock.submit(number, 100, 5)
        for _ in range(5):
            clock.step_s()
        assert clock.token_s[f"r{number}"][0] - asked_s <= 2 * long_step_s
        assert clock.longest_gap_s(f"r{number}") <= CHUNK_S + 1e-9
        number += 1
    assert number == 205, "the prefill was running all the while"


def test_steps_are_long_while_nobody_streams_and_short_at_once_when_somebody_does() -> None:
    clock = Clock(LONG_STEPS)
    clock.submit(1, 2**17, 9)
    held = [clock.step() and clock.rows() for _ in range(4)]
    assert held == [{1: 2048}, {1: 4096}, {1: 8192}, {1: 8192}]
    clock.submit(2, 100, 4)
    held = [clock.step() and clock.rows() for _ in range(5)]
    assert held == [{2: 100, 1: 8092}, *[{2: 1, 1: 2047}] * 3, {1: 8192}]


def test_several_long_prompts_share_a_long_step() -> None:
    clock = Clock(LONG_STEPS)
    for number in range(1, 4):
        clock.submit(number, 40_000, 2)
    clock.step(3)
    assert clock.rows() == {1: 2730, 2: 2731, 3: 2731}


def test_a_long_step_takes_in_no_more_than_streams_have_room_for() -> None:
    clock = Clock(BatchOptions(max_batch_tokens=8, max_prefill_step_tokens=64))
    clock.submit(1, 500, 2)
    clock.step(3)
    for number in range(2, 20):
        clock.submit(number, 2, 3)
    assert len(clock.step().rows) == 8
    assert [row.count for row in clock.step().rows] == [1] * 8, "each has a row, the long prompt too"


def test_long_prompts_advance_together_and_use_the_whole_step() -> None:
    clock = Clock()
    for number in range(1, 4):
        clock.submit(number, 40_000, 2)
    clock.step()
    assert clock.rows() == {1: 682, 2: 683, 3: 683}
    clock.step(20)
    assert sum(clock.rows().values()) == BUDGET
    while not clock.token_times["r1"]:
        clock.step()
    assert clock.now == -(-3 * 40_000 // BUDGET)


def test_short_prompts_without_end_leave_half_of_every_step_to_a_long_one() -> None:
    clock = Clock()
    clock.submit(1, 65_536, 2)
    number = 1
    while not clock.token_times["r1"]:
        for _ in range(3):
            number += 1
            clock.submit(number, 1000, 1)
        clock.step()
    assert clock.now == 65_536 // (BUDGET // 2)
    assert len([times for times in clock.token_times.values() if times]) == BUDGET // 2 * clock.now // 1000 + 1


@pytest.mark.parametrize(
    ("options", "prompt_tokens", "rows"),
    [
        (BatchOptions(max_batch_tokens=400, long_prefill_tokens=300), 300, {1: 200, 2: 100, 3: 100}),
        (BatchOptions(max_batch_tokens=400, long_prefill_tokens=300), 301, {1: 133, 2: 133, 3: 134}),
        (BatchOptions(max_batch_tokens=400), 200, {1: 200, 2: 100, 3: 100}),
        (BatchOptions(max_batch_tokens=400), 201, {1: 133, 2: 133, 3: 134}),
    ],
    ids=["short", "long", "short-by-default", "long-by-default"],
)
def test_a_long_prompt_has_more_tokens_than_the_bound(
    options: BatchOptions, prompt_tokens: int, rows: dict[int, int]
) -> None:
    clock = Clock(options)
    clock.submit(1, prompt_tokens, 2)
    clock.submit(2, 9000, 2)
    clock.submit(3, 9000, 2)
    clock.step()
    assert clock.rows() == rows


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="long prefill tokens is 0"):
        BatchOptions(long_prefill_tokens=0)


def test_a_long_prompt_keeps_its_pages_from_younger_streams() -> None:
    """Sixteen short ones decode beside an older long prompt that leaves them little: it never waits, they give way."""
    run = CheckedRun(KvSharding(page_tokens=4, pages_per_rank=(60, 60)), BatchOptions(max_batch_tokens=32))
    run.submit(toy_submit(0, 400, 40, ignore_eos=True))
    for number in range(1, 17):
        run.submit(toy_submit(number, 2, 100, ignore_eos=True))
    while not run.outputs["r0"]:
        run.step()
    assert run.scheduler.step <= 400 // 16
    assert run.scheduler.preemptions > 0
    run.finish(max_steps=5000)


def sequence(number: int, is_long: bool) -> Sequence:
    made = Sequence(number, f"r{number}", bytes(4), SamplingParams(), 0, frozenset())
    made.is_long = is_long
    return made


wishes = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=12)


@given(st.integers(1, 60), wishes, wishes)
def test_shares_use_the_step_and_forget_nobody(
    tokens: int, running: list[tuple[bool, int]], arriving: list[tuple[bool, int]]
) -> None:
    shares = PromptShares(tokens)
    wanted: dict[int, int] = {}
    for is_long, wish in running[:tokens]:
        shares.add(sequence(len(wanted), is_long), wish)
        wanted[len(wanted)] = wish
    num_running = len(wanted)
    for is_long, wish in arriving:
        if not shares.has_room_for(wish, is_long=is_long):
            break
        shares.add(sequence(len(wanted), is_long), wish)
        wanted[len(wanted)] = wish
    dealt = {s.id: (s.is_long, share) for s, share in shares.deal()}
    assert sum(share for _, share in dealt.values()) == min(tokens, sum(wanted.values()))
    assert all(1 <= share <= wanted[number] for number, (_, share) in dealt.items())
    if len(wanted) > num_running:
        assert dealt.keys() == wanted.keys(), "somebody came in at another's expense"
    wants_long = sum(wish for (is_long, wish) in running[:tokens] if is_long)
    if len(wanted) == num_running:
        for is_long in (True, False):
            kind = [number for number, (long, _) in enumerate(running[:tokens]) if long is is_long]
            share = sum(dealt[number][1] for number in kind if number in dealt)
            if is_long:
                assert share >= min(wants_long, tokens // 2)
                assert dealt.keys() >= set(kind)
            elif kind:
                assert share >= 1
