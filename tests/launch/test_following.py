"""What a rank other than 0 does with rank 0's messages, and what its watch makes of steps that overlap."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from leanserve.contracts.batch import Batch, IdleCheck, StepResult, Stop
from leanserve.launch import step_watch
from leanserve.launch.all_ranks import follow
from leanserve.launch.meeting import Card
from leanserve.launch.step_watch import StepWatch


def step(number: int, checked_step: int) -> Batch:
    return Batch(number, [], [], [], [], [], checked_step, 0)


class RecordingRunner:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps_in_flight: list[int] = []

    def launch(self, batch: Batch) -> None:
        self.calls.append(f"launch {batch.step}")
        self.steps_in_flight.append(batch.step)

    def collect(self) -> StepResult:
        number = self.steps_in_flight.pop(0)
        self.calls.append(f"collect {number}")
        return StepResult(number, [])

    def compare_pasts(self) -> None:
        self.calls.append("compare")


class Script:
    """Says one message after the other; None stands for a silence, which only who gives a timeout can hear."""

    def __init__(self, messages: list[Batch | IdleCheck | Stop | None]) -> None:
        self.messages: Iterator[Any] = iter(messages)

    def receive(self, timeout_ms: int | None = None) -> Any:
        message = next(self.messages)
        assert message is not None or timeout_ms is not None, "waits for ever with a step in flight"
        return message

    def close(self) -> None:
        pass


def followed(messages: list[Batch | IdleCheck | Stop | None]) -> list[str]:
    runner = RecordingRunner()
    follow(SimpleNamespace(runner=runner), Script([*messages, Stop()]))  # type: ignore[arg-type]
    assert runner.steps_in_flight == []
    return runner.calls


def test_steps_are_collected_where_rank_0_collected_them():
    in_turn = followed([step(1, 0), step(2, 1), step(3, 2)])
    assert in_turn == ["launch 1", "collect 1", "launch 2", "collect 2", "launch 3", "collect 3"]
    overlapped = followed([step(1, 0), step(2, 0), step(3, 1)])
    assert overlapped == ["launch 1", "launch 2", "collect 1", "launch 3", "collect 2", "collect 3"]
    drained_once = followed([step(1, 0), step(2, 0), step(3, 2), step(4, 2)])
    assert drained_once[3:6] == ["collect 2", "launch 3", "launch 4"]


def test_the_last_step_is_collected_when_nothing_follows():
    assert followed([step(1, 0), step(2, 0), None, IdleCheck()])[2:] == ["collect 1", "collect 2", "compare"]
    assert followed([step(1, 0), IdleCheck()]) == ["launch 1", "collect 1", "compare"]


def test_a_step_runs_from_its_launch_or_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(step_watch.time, "monotonic", lambda: clock.now)
    card = Card(0, 1, "here", 2, leanserve="", torch="", model="")
    with zmq.Context() as context:
        watch = StepWatch(
            context, 0, [card], pulse_address="inproc://nobody", step_timeout_s=9, stacks_claim=Path("unused")
        )
        for clock.now, what, running_since in (
            (1.0, watch.begin, 1.0),
            (2.0, watch.begin, 1.0),
            (5.0, lambda: watch.end(1), 5.0),
            (6.0, watch.begin, 5.0),
            (7.0, lambda: watch.end(2), 7.0),
            (8.0, lambda: watch.end(3), None),
        ):
            what()
            assert watch._began_at == running_since
