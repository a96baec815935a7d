import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from engine.fake_executors import EchoExecutor, FailingExecutor, HeldExecutor, ToyModelExecutor, toy_completion
from engine.workload import token_bytes
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import (
    Abort,
    EngineFailed,
    FromEngine,
    Shutdown,
    Submit,
    TokenOutput,
    TokenOutputs,
    decode_from_engine,
    encode,
)
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine, Executor
from leanserve.engine.scheduler import Scheduler
from leanserve.engine.service import serve

PATIENCE_MS = 60_000


class FrontEnd:
    """The other end of the engine's socket, with `serve` running in a thread."""

    def __init__(self, socket: zmq.Socket[bytes], thread: threading.Thread, stop: threading.Event) -> None:
        self.socket = socket
        self.thread = thread
        self.stop = stop
        self.raised: list[Exception] = []

    def send(self, *messages: object) -> None:
        for message in messages:
            self.socket.send(encode(message))

    def receive(self) -> FromEngine:
        assert self.socket.poll(PATIENCE_MS), "the engine is silent"
        return decode_from_engine(self.socket.recv())

    def outputs_until(self, *request_ids: str) -> list[TokenOutput]:
        """All outputs up to the last ones of these requests."""
        outputs: list[TokenOutput] = []
        open_ids = set(request_ids)
        while open_ids:
            message = self.receive()
            assert isinstance(message, TokenOutputs)
            outputs += message.outputs
            open_ids -= {output.request_id for output in message.outputs if output.finish_reason}
        return outputs

    def join(self) -> None:
        self.thread.join(PATIENCE_MS / 1000)
        assert not self.thread.is_alive()


@contextmanager
def serving(
    executor: Executor,
    *first: Submit,
    high_water_mark: int = 1000,
    overlap: bool = False,
    when_idle: Callable[[], object] = lambda: None,
) -> Iterator[FrontEnd]:
    """`first` has arrived when the service starts."""
    scheduler = Scheduler(KvSharding(page_tokens=4, pages_per_rank=(50, 50)), BatchOptions(max_batch_tokens=64), 300)
    engine = Engine(scheduler, executor, [], overlap=overlap)
    stop = threading.Event()
    with zmq.Context() as context, context.socket(zmq.DEALER) as near, context.socket(zmq.DEALER) as far:
        for socket in (near, far):
            socket.set_hwm(high_water_mark)
            socket.linger = 0
        near.bind("inproc://engine")
        far.connect("inproc://engine")

        def run() -> None:
            try:
                serve(engine, far, stop, when_idle=when_idle)
            except Exception as error:
                front_end.raised.append(error)

        front_end = FrontEnd(near, threading.Thread(target=run), stop)
        front_end.send(*first)
        front_end.thread.start()
        try:
            yield front_end
        finally:
            stop.set()
            front_end.join()


def submit(request_id: str, prompt_tokens: int, max_tokens: int) -> Submit:
    return Submit(request_id, token_bytes(list(range(prompt_tokens))), SamplingParams(max_tokens=max_tokens))


def test_requests_join_and_leave_while_others_run() -> None:
    with serving(EchoExecutor()) as front_end:
        front_end.send(submit("a", 30, 40), submit("b", 3, 2))
        outputs = front_end.outputs_until("a", "b")
        assert [output.token_ids for output in outputs if output.request_id == "b"] == [[2], [2]]
        assert sum(output.request_id == "a" for output in outputs) == 40
        front_end.send(submit("c", 3, 1))
        assert front_end.outputs_until("c")[-1] == TokenOutput("c", [3], "length", cached_tokens=2, page_owners=b"\0\0")


def test_every_step_reports_the_load() -> None:
    with serving(EchoExecutor()) as front_end:
        front_end.send(submit("a", 70, 1))
        steps = [front_end.receive() for _ in range(3)]
        assert [len(message.outputs) for message in steps] == [0, 1, 0]
        assert [message.step for message in steps] == [1, 2, 3]
        assert [message.running for message in steps] == [1, 0, 0]
        assert [message.pages_used_per_rank for message in steps] == [(8, 8), (0, 0), (0, 0)]


def test_an_abort_is_answered_and_its_pages_come_back() -> None:
    executor = HeldExecutor(at_step=3)
    with serving(executor) as front_end:
        front_end.send(submit("a", 3, 250))
        front_end.receive()
        front_end.send(Abort("a"), Abort("unknown"))
        executor.go_on.set()
        outputs = front_end.outputs_until("a")
        assert outputs[-1] == TokenOutput("a", [], "abort")
        assert front_end.receive().pages_used_per_rank == (0, 0)


def test_a_refusal_goes_to_its_request_alone() -> None:
    with serving(EchoExecutor()) as front_end:
        front_end.send(submit("a", 3, 5), submit("huge", 299, 2))
        outputs = front_end.outputs_until("a", "huge")
        (refusal,) = [output for output in outputs if output.request_id == "huge"]
        assert refusal.finish_reason == "error"
        assert "301 together" in str(refusal.error)
        assert sum(output.request_id == "a" for output in outputs) == 5


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xc1", b"no msgpack", encode({"type": "dance"}), encode({"type": "submit", "request_id": 3}), bytes(9999)],
    ids=["empty", "reserved", "text", "unknown-type", "wrong-field", "zeros"],
)
def test_a_frame_that_cannot_be_read_is_logged_and_dropped(frame: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), serving(EchoExecutor()) as front_end:
        front_end.socket.send(frame)
        front_end.send(submit("a", 3, 2))
        assert len(front_end.outputs_until("a")) == 2
    assert f"dropped a message of {len(frame)} bytes" in caplog.text


def test_a_request_under_a_live_id_is_logged_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """An answer to it would end the live one."""
    twice = submit("a", 3, 5)
    with caplog.at_level(logging.ERROR), serving(EchoExecutor(), twice, twice) as front_end:
        outputs = front_end.outputs_until("a")
        assert [output.token_ids for output in outputs] == [[1]] * 5
        assert outputs[-1].finish_reason == "length"
    assert "request id 'a' is in use" in caplog.text


def test_a_failing_step_ends_the_service_and_leaves_its_requests_to_the_front_end() -> None:
    error = OSError("the device is gone")
    with serving(FailingExecutor(2, error), submit("a", 3, 9), submit("b", 100, 9)) as front_end:
        while isinstance(message := front_end.receive(), TokenOutputs):
            assert not [output for output in message.outputs if output.finish_reason]
        assert message == EngineFailed("OSError: the device is gone")
        front_end.join()
        assert front_end.raised == [error]
        assert front_end.stop.is_set()


def test_a_request_goes_on_behind_what_another_engine_generated() -> None:
    """The toy model's tokens depend on all tokens before them and on the seed."""
    sharding = KvSharding(page_tokens=4, pages_per_rank=(50, 50))
    prompt, sampling = token_bytes(list(range(9))), SamplingParams(max_tokens=30, seed=5)
    tokens, reason = toy_completion(prompt, 5, 30, frozenset())
    with serving(ToyModelExecutor(sharding), Submit("a", prompt, sampling, token_bytes(tokens[:13]))) as front_end:
        outputs = front_end.outputs_until("a")
    assert [token for output in outputs for token in output.token_ids] == tokens[13:]
    assert outputs[-1].finish_reason == reason
    assert outputs[0].cached_tokens == 0, "told with the first token of all, which another engine gave"


@pytest.mark.parametrize(("output_tokens", "message"), [(5, "nothing is left to do"), (6, "nothing is left to do")])
def test_a_request_that_has_all_its_tokens_is_refused(output_tokens: int, message: str) -> None:
    done = Submit("a", token_bytes([1]), SamplingParams(max_tokens=5), token_bytes([1] * output_tokens))
    with serving(EchoExecutor(), done) as front_end:
        assert message in str(front_end.outputs_until("a")[-1].error)


def test_an_idle_engine_looks_after_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanserve.engine.service.IDLE_CHECK_S", 0.0)
    checks: list[int] = []

    def fail_the_third_time() -> None:
        checks.append(1)
        if len(checks) == 3:
            raise OSError("rank 1 does not answer")

    with serving(EchoExecutor(), when_idle=fail_the_third_time) as front_end:
        assert front_end.receive() == EngineFailed("OSError: rank 1 does not answer")


@pytest.mark.parametrize("how", ["message", "event"])
def test_a_shutdown_ends_all_requests_and_the_service(how: str) -> None:
    executor = HeldExecutor(at_step=3)
    with serving(executor) as front_end:
        front_end.send(submit("a", 3, 290))
        front_end.receive()
        if how == "message":
            front_end.send(Shutdown())
        else:
            front_end.stop.set()
        executor.go_on.set()
        assert front_end.outputs_until("a")[-1].error == "the engine is shutting down"
        front_end.join()
        assert front_end.raised == []
        assert front_end.stop.is_set()


def test_a_shutdown_with_a_step_in_flight_delivers_its_token() -> None:
    executor = HeldExecutor(at_step=11)
    with serving(executor, overlap=True) as front_end:
        front_end.send(submit("a", 3, 290))
        assert executor.is_held.wait(PATIENCE_MS / 1000)
        front_end.send(Shutdown())
        executor.go_on.set()
        outputs = front_end.outputs_until("a")
        assert outputs[-1].error == "the engine is shutting down"
        front_end.join()
    sampled = sum(bool(batch.rows) for batch in executor.batches)
    assert sum(len(output.token_ids) for output in outputs) == sampled
    assert not executor.results


def test_a_front_end_that_does_not_read_holds_the_engine_up_and_loses_nothing() -> None:
    """Two queues of five, and one message in hand."""
    executor = HeldExecutor(at_step=11)
    with serving(executor, high_water_mark=5) as front_end:
        front_end.send(submit("a", 3, 200))
        assert executor.is_held.wait(PATIENCE_MS / 1000)
        executor.go_on.set()
        for received in range(1, 201):
            assert front_end.receive().outputs[0].token_ids == [1]
            assert len(executor.batches) <= received + 11


def test_a_stuck_front_end_does_not_keep_the_engine_from_stopping() -> None:
    executor = HeldExecutor(at_step=11)
    with serving(executor, high_water_mark=5) as front_end:
        front_end.send(submit("a", 3, 200))
        assert executor.is_held.wait(PATIENCE_MS / 1000)
        executor.go_on.set()
        front_end.stop.set()
        front_end.join()
