import pytest

from engine.fake_executors import EchoExecutor, FailingExecutor, ImmediateExecutor
from engine.workload import CheckedRun, token_bytes, toy_submit
from leanserve.contracts.batch import StepResult, step_checksum
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import DesyncError, EngineError, RequestError
from leanserve.contracts.kv_sharding import KvSharding, page_imbalance
from leanserve.contracts.messages import Submit, TokenOutput
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine, Executor
from leanserve.engine.scheduler import Scheduler

SHARDING = KvSharding(page_tokens=4, pages_per_rank=(20, 20))


def engine_with(executor: Executor, eos_token_ids=()) -> Engine:
    return Engine(Scheduler(SHARDING, BatchOptions(max_batch_tokens=8), 100), executor, eos_token_ids)


def submit(request_id: str, prompt_tokens: int, **sampling) -> Submit:
    return Submit(request_id, token_bytes(list(range(prompt_tokens))), SamplingParams(**sampling))


def run(engine: Engine) -> list[TokenOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_tokens_come_one_by_one_and_the_last_says_why() -> None:
    engine = engine_with(EchoExecutor())
    engine.submit(submit("a", 3, max_tokens=3))
    assert engine.step() == [TokenOutput("a", [1], page_owners=b"\0\0")]  # one page, on rank 0
    assert engine.step() == [TokenOutput("a", [1])]
    assert engine.step() == [TokenOutput("a", [1], "length")]


# The EchoExecutor's token is 1, and the engine's end-of-sequence token too where the case says so.
@pytest.mark.parametrize(
    ("eos", "sampling", "tokens", "reason"),
    [
        ([1], {"max_tokens": 5}, 1, "stop"),
        ([1], {"max_tokens": 1}, 1, "stop"),
        ([1], {"max_tokens": 5, "ignore_eos": True}, 5, "length"),
        ([], {"max_tokens": 5, "stop_token_ids": (9, 1)}, 1, "stop"),
        ([1], {"max_tokens": 5, "stop_token_ids": (1,), "ignore_eos": True}, 1, "stop"),
        ([9], {"max_tokens": 5, "stop_token_ids": (8,)}, 5, "length"),
    ],
    ids=["eos", "eos-on-the-last-token", "ignore-eos", "stop-id", "eos-as-stop-id", "neither"],
)
def test_a_completion_ends_for_the_right_reason(eos: list[int], sampling: dict, tokens: int, reason: str) -> None:
    engine = engine_with(EchoExecutor(), eos)
    engine.submit(submit("a", 3, **sampling))
    outputs = run(engine)
    assert [output.token_ids for output in outputs] == [[1]] * tokens
    assert outputs[-1].finish_reason == reason
    assert outputs[-1].stop_token_id == (1 if reason == "stop" else None)


def test_each_step_carries_the_checksum_of_the_last() -> None:
    executor = EchoExecutor()
    engine = engine_with(executor)
    engine.submit(submit("a", 3, max_tokens=2))
    run(engine)
    checked = [(batch.checked_step, batch.checksum) for batch in executor.batches]
    assert checked == [(0, 0), (1, step_checksum(1, [1])), (2, step_checksum(2, [1]))]
    assert step_checksum(1, [1]) != step_checksum(2, [1]) != step_checksum(1, [2])


def test_a_seed_is_drawn_once_for_a_request_without_one() -> None:
    executor = EchoExecutor()
    engine = engine_with(executor)
    engine.submit(submit("a", 1, max_tokens=1))
    engine.submit(submit("b", 1, max_tokens=1))
    engine.submit(submit("c", 1, max_tokens=1, seed=-5))
    run(engine)
    a, b, c = executor.batches[0].started
    assert a.seed != b.seed
    assert 0 <= a.seed < 2**63
    assert c.seed == -5


@pytest.mark.parametrize("steps", [0, 1, 2, 3], ids=["queued", "in-prefill", "at-the-first-token", "in-decode"])
def test_an_abort_ends_a_request_once_in_every_phase(steps: int) -> None:
    engine = engine_with(EchoExecutor())
    engine.submit(submit("a", 12, max_tokens=9))
    for _ in range(steps):
        engine.step()
    assert engine.abort("a") == TokenOutput("a", [], "abort")
    assert engine.abort("a") is None
    assert run(engine) == []
    assert engine.report([]).pages_used_per_rank == (0, 0)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (submit("new", 0), "no tokens"),
        (Submit("new", b"12345", SamplingParams()), "5 bytes"),
        (submit("live", 3), "'live' is in use"),
        (submit("new", 90, max_tokens=11), "101 together"),
    ],
    ids=["empty", "not-int32", "id-in-use", "too-long"],
)
def test_a_refused_request_leaves_no_trace(request_: Submit, says: str) -> None:
    engine = engine_with(EchoExecutor())
    engine.submit(submit("live", 3, max_tokens=2))
    with pytest.raises(ValueError, match=says) as refusal:
        engine.submit(request_)
    assert isinstance(refusal.value, RequestError) == (request_.request_id != "live")
    assert [output.request_id for output in run(engine)] == ["live", "live"]


@pytest.mark.parametrize("at_step", [1, 2, 3, 4])
def test_a_failing_step_ends_every_live_request_once(at_step: int) -> None:
    error = DesyncError("rank 1 has another checksum for step 2")
    engine = engine_with(FailingExecutor(at_step, error))
    for name, prompt_tokens, max_tokens in (("short", 2, 1), ("long", 13, 9), ("queued", 60, 9)):
        engine.submit(submit(name, prompt_tokens, max_tokens=max_tokens))
    ends = [output for _ in range(1, at_step) for output in engine.step() if output.finish_reason]
    with pytest.raises(DesyncError) as raised:
        engine.step()
    assert raised.value is error
    ends += engine.fail("the engine failed")
    assert sorted(end.request_id for end in ends) == ["long", "queued", "short"]
    assert {end.error for end in ends if end.finish_reason == "error"} == {"the engine failed"}
    assert engine.fail("again") == []


@pytest.mark.parametrize(
    "result", [StepResult(1, []), StepResult(1, [4, 5]), StepResult(2, [4])], ids=["none", "two", "other-step"]
)
def test_a_result_that_is_not_the_steps_is_an_engine_error(result: StepResult) -> None:
    engine = engine_with(ImmediateExecutor(lambda batch: result))
    engine.submit(submit("a", 3))
    with pytest.raises(EngineError, match="step 1 should give 1 tokens"):
        engine.step()
    assert [output.finish_reason for output in engine.fail("gone")] == ["error"]


def test_the_report_shows_the_load() -> None:
    checked = CheckedRun(KvSharding(page_tokens=4, pages_per_rank=(4, 4)), BatchOptions(max_batch_tokens=16))
    checked.submit(toy_submit(1, 9, 9, ignore_eos=True))
    checked.submit(toy_submit(2, 20, 2, ignore_eos=True))
    checked.step()
    report = checked.engine.report([])
    assert (report.step, report.running, report.waiting, report.preemptions) == (1, 1, 1, 0)
    assert report.pages_used_per_rank == (2, 1)
    checked.finish(max_steps=100)
    assert checked.engine.report([]).pages_used_per_rank == (0, 0)


def test_each_step_is_reported_once_with_what_it_held() -> None:
    checked = CheckedRun(KvSharding(page_tokens=4, pages_per_rank=(9, 9, 9)), BatchOptions(max_batch_tokens=8))
    checked.submit(toy_submit(1, 3, 9, ignore_eos=True))
    checked.step()
    checked.submit(toy_submit(2, 20, 2, ignore_eos=True))
    checked.step()
    report = checked.engine.report([]).step_report
    assert report is not None
    assert (report.decode_rows, report.prefill_tokens) == (1, 7)
    assert 0 < report.schedule_s < 1
    assert checked.engine.report([]).step_report is None, "told twice"
    checked.engine.abort("r2")
    assert checked.engine.report([]).step_report is None, "there was no step"


def test_the_report_counts_what_the_prefix_cache_was_asked_for_and_held() -> None:
    checked = CheckedRun(KvSharding(page_tokens=4, pages_per_rank=(9, 9)), BatchOptions(max_batch_tokens=64))
    checked.serve(toy_submit(1, 9, 1))
    report = checked.engine.report([])
    assert (report.prefix_queried_tokens, report.prefix_hit_tokens) == (9, 0)
    assert report.pages_cached_per_rank == (2, 1)
    assert page_imbalance(report.pages_used_per_rank) == 1
    checked.submit(toy_submit(2, 1, 9, behind=checked.text("r1"), ignore_eos=True))
    checked.step()
    report = checked.engine.report([])
    assert (report.prefix_queried_tokens, report.prefix_hit_tokens) == (20, 9)
    assert report.pages_cached_per_rank == (0, 0)
    assert report.pages_used_per_rank == (2, 1)
    assert page_imbalance(report.pages_used_per_rank) == 4 / 3, "two pages where an even share would be one and a half"
