"""Steps that overlap: what is launched before what is known, and what becomes of who ended meanwhile."""

from collections.abc import Callable

import msgspec
import pytest

from engine.fake_executors import EchoExecutor, FailingExecutor, RecordingExecutor
from engine.workload import CheckedRun, token_bytes, toy_submit
from leanserve.contracts.batch import Row, StepResult
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Submit, TokenOutput
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from leanserve.engine.engine import Engine, Executor
from leanserve.engine.scheduler import Scheduler

SHARDING = KvSharding(page_tokens=4, pages_per_rank=(10, 10))


def engine_with(executor: Executor, eos_token_ids: tuple[int, ...] = (), sharding: KvSharding = SHARDING) -> Engine:
    scheduler = Scheduler(sharding, BatchOptions(max_batch_tokens=32), 60)
    return Engine(scheduler, executor, eos_token_ids, overlap=True)


def submit(request_id: str, prompt_tokens: int, max_tokens: int, **sampling) -> Submit:
    prompt = token_bytes([ord(request_id)] * prompt_tokens)
    return Submit(request_id, prompt, SamplingParams(max_tokens=max_tokens, **sampling))


def run(engine: Engine) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_each_step_is_launched_before_the_one_before_it_is_collected() -> None:
    executor = RecordingExecutor()
    engine = engine_with(executor)
    engine.submit(submit("a", 3, max_tokens=4))
    assert engine.step() == [], "nothing is known yet"
    assert [output.token_ids for output in run(engine)] == [[1]] * 4
    assert executor.calls == [
        ("launch", 1),
        *[call for step in (1, 2, 3) for call in (("launch", step + 1), ("collect", step))],
        ("collect", 4),  # the last token by max_tokens: there is nothing to launch
        ("launch", 5),  # who is to be forgotten
        ("collect", 5),
    ]
    assert [batch.rows for batch in executor.batches] == [
        [Row(1, 0, 3, True)],
        *[[Row(1, position, 1, True)] for position in (3, 4, 5)],
        [],
    ]
    assert [batch.checked_step for batch in executor.batches] == [0, 0, 1, 2, 4]


def test_without_overlap_no_step_is_launched_before_the_last_is_collected() -> None:
    executor = RecordingExecutor()
    engine = Engine(Scheduler(SHARDING, BatchOptions(), 60), executor, ())
    engine.submit(submit("a", 3, max_tokens=3))
    run(engine)
    assert executor.calls == [(what, step) for step in (1, 2, 3, 4) for what in ("launch", "collect")]


def test_a_surplus_token_goes_nowhere_and_its_pages_come_back() -> None:
    """Both end with their first token; the step that follows was launched with a row of each."""
    executor = RecordingExecutor()
    engine = engine_with(executor, eos_token_ids=(1, 2))
    engine.submit(submit("a", 3, max_tokens=9))
    engine.submit(submit("b", 8, max_tokens=9))
    outputs = run(engine)
    assert [(o.request_id, o.token_ids, o.finish_reason) for o in outputs] == [("a", [1], "stop"), ("b", [2], "stop")]
    assert [len(batch.rows) for batch in executor.batches] == [2, 2, 0]
    assert executor.batches[2].dropped == [1, 2]
    assert engine.report([]).pages_used_per_rank == (0, 0)


@pytest.mark.parametrize("steps", [1, 2, 3], ids=["in-prefill", "at-the-first-token", "in-decode"])
def test_an_abort_with_a_step_in_flight_ends_a_request_once(steps: int) -> None:
    executor = EchoExecutor()
    engine = engine_with(executor)
    engine.submit(submit("a", 40, max_tokens=9))
    for _ in range(steps):
        engine.step()
    assert executor.results, "a step is in flight"
    assert engine.abort("a") == TokenOutput("a", [], "abort")
    assert engine.report([]).pages_used_per_rank == (0, 0)
    assert run(engine) == []
    assert executor.batches[-1].dropped == [1]


class SomeFailed(EchoExecutor):
    """Echoes; a grammar is complete, or has failed, with its sequence's third token."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def collect(self) -> StepResult:
        result = super().collect()
        if result.step != 3:
            return result
        return StepResult(3, result.token_ids, **{"complete": {1}} if self.how == "stop" else {"failed": {1: "broken"}})


@pytest.mark.parametrize("how", ["stop", "error"])
def test_a_grammar_reads_each_token_before_the_next_step_is_planned(how: str) -> None:
    executor = SomeFailed(how)
    engine = engine_with(executor)
    engine.submit(submit("a", 3, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="x*")))
    outputs = run(engine)
    assert [output.finish_reason for output in outputs] == [None, None, how]
    assert [batch.checked_step for batch in executor.batches] == [0, 1, 2, 3], "all before it, each time"
    assert [len(batch.rows) for batch in executor.batches] == [1, 1, 1, 0], "no surplus row"


class NotFinite(EchoExecutor):
    """Echoes; the first sequence's second token cannot be drawn."""

    def collect(self) -> StepResult:
        result = super().collect()
        return msgspec.structs.replace(result, not_finite={1}) if result.step == 2 else result


def test_who_gets_no_token_ends_alone_and_leaves_nothing_to_be_found(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_with(NotFinite())
    for name in ("a", "b"):
        engine.submit(submit(name, 9, max_tokens=4, cache_salt=name))
    outputs = run(engine)
    (end,) = [output for output in outputs if output.request_id == "a" and output.finish_reason]
    assert (end.token_ids, end.finish_reason, end.error_code) == ([], "error", None)
    assert "logits that are not finite" in (end.error or "")
    assert [output.token_ids for output in outputs if output.request_id == "b"] == [[2]] * 4
    (record,) = caplog.records
    assert vars(record)["event"] == "logits_not_finite"
    assert vars(record)["request_id"] == "a"
    report = engine.report([])
    assert (report.pages_used_per_rank, sum(report.pages_cached_per_rank)) == ((0, 0), 3), "those of b"


def test_a_long_prompt_behind_a_grammar_does_not_wait_for_tokens() -> None:
    executor = EchoExecutor()
    engine = engine_with(executor)
    wish = StructuredOutputsParams(regex="x*")
    engine.submit(submit("a", 50, max_tokens=9, structured_outputs=wish))
    engine.step()
    engine.step()
    assert executor.batches[1].checked_step == 0, "in the middle of its prompt there is nothing to read"


def test_nobody_is_sent_away_for_pages_that_the_step_in_flight_gives_back() -> None:
    """Four pages: the first needs its third one in the step after the second one's last."""
    executor = EchoExecutor()
    engine = engine_with(executor, (), KvSharding(page_tokens=4, pages_per_rank=(4,)))
    engine.submit(submit("a", 7, max_tokens=6))
    engine.submit(submit("b", 5, max_tokens=2))
    outputs = run(engine)
    assert [o.finish_reason for o in outputs if o.request_id == "b"] == [None, "length"]
    assert [o.token_ids for o in outputs if o.request_id == "a"] == [[1]] * 6
    assert engine.report([]).preemptions == 0
    assert [batch.checked_step for batch in executor.batches[:4]] == [0, 0, 2, 2], "the third waited for the second"


def test_who_is_sent_away_takes_all_tokens_along() -> None:
    run = CheckedRun(KvSharding(page_tokens=4, pages_per_rank=(4,)), BatchOptions(), overlap=True)
    run.submit(toy_submit(1, 7, 9, ignore_eos=True))
    run.submit(toy_submit(2, 6, 5, ignore_eos=True))
    run.finish(max_steps=100)
    assert run.scheduler.preemptions == 1


def test_pages_of_tokens_that_were_in_flight_are_shared_once_those_are_known() -> None:
    """The toy model checks what a shared page holds; the first request decodes on meanwhile."""
    checked = CheckedRun(KvSharding(page_tokens=4, pages_per_rank=(9,)), BatchOptions(), overlap=True)
    checked.submit(toy_submit(1, 5, 20, ignore_eos=True))
    while len(checked.outputs["r1"]) < 6:
        checked.step()
    text = checked.text("r1")
    assert len(text) == 4 * 11
    assert checked.serve(toy_submit(2, 3, 2, behind=text[: 4 * 8])) == 8
    assert "r1" not in checked.ends
    checked.finish(max_steps=100)


@pytest.mark.parametrize("when_collected", [False, True], ids=["at-launch", "at-collect"])
def test_a_step_that_fails_beside_another_ends_every_live_request_once(when_collected: bool) -> None:
    error = OSError("the device is gone")
    engine = engine_with(FailingExecutor(3, error, when_collected=when_collected))
    engine.submit(submit("a", 3, max_tokens=9))
    engine.submit(submit("b", 50, max_tokens=9))
    with pytest.raises(OSError, match="gone"):
        run(engine)
    ends = engine.fail("the engine failed")
    assert sorted(end.request_id for end in ends) == ["a", "b"]
    assert {end.error for end in ends} == {"the engine failed"}


def test_busy_steps_add_up_to_the_time_that_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each step: a second to plan it, ten until its tokens are here, and two to book them."""
    now = 100.0

    def after(seconds: float, work: Callable[[], object]) -> object:
        nonlocal now
        result = work()
        now += seconds
        return result

    monkeypatch.setattr("leanserve.engine.engine.time.perf_counter", lambda: now)
    executor = EchoExecutor()
    engine = engine_with(executor)
    scheduler, collect = engine._scheduler, executor.collect
    next_batch, complete = scheduler.next_batch, scheduler.complete
    monkeypatch.setattr(scheduler, "next_batch", lambda: after(1, next_batch))
    monkeypatch.setattr(executor, "collect", lambda: after(10, collect))
    monkeypatch.setattr(scheduler, "complete", lambda *args: after(2, lambda: complete(*args)))
    engine.submit(submit("a", 3, max_tokens=3))
    reports = []
    while engine.has_work:
        report = engine.report(engine.step()).step_report
        reports += [] if report is None else [report]
    assert [report.schedule_s for report in reports] == [3, 3, 3, 3]
    assert sum(report.step_s for report in reports) == now - 100


def test_the_engine_is_idle_only_when_nothing_is_in_flight() -> None:
    executor = EchoExecutor()
    engine = engine_with(executor)
    engine.submit(submit("a", 3, max_tokens=1))
    engine.step()
    assert engine.has_work
    assert [output.finish_reason for output in engine.collect()] == ["length"]
    assert engine.collect() == []
    assert run(engine) == []
    assert not executor.results
