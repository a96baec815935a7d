"""Real engines on the toy model that die at any step, one after the other: what the front end keeps is enough for each
request to end once, with the tokens it gets alone."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fake_executors import ToyModelExecutor, toy_completion
from engine.workload import EOS_TOKEN_ID, toy_submit
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Submit, TokenOutput
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.server.live_requests import LiveRequest, LiveRequests
from leanserve.server.output_stream import OutputStream
from leanserve.server.statistics import RequestTimes

SHARDING = KvSharding(page_tokens=4, pages_per_rank=(6, 0, 5))


class FrontEnd:
    """`LiveRequests` as `EngineClient` uses it, without sockets."""

    def __init__(self) -> None:
        self.live = LiveRequests()
        self.submits: dict[str, Submit] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.start_engine()

    def start_engine(self) -> None:
        options = BatchOptions(max_batch_tokens=9, max_sequences=3)
        scheduler = Scheduler(SHARDING, options, SHARDING.total_tokens)
        self.engine = Engine(scheduler, ToyModelExecutor(SHARDING), [EOS_TOKEN_ID], clock=lambda: 0.0)
        self.give(self.live.to_resume())

    def give(self, submits: list[Submit]) -> None:
        for submit in submits:
            self.engine.submit(submit)

    def ask(self, submit: Submit) -> None:
        stream = OutputStream(lambda *_: None, lambda *_: None, 10_000)
        times = RequestTimes(0.0, len(submit.prompt_token_ids) // 4)
        request = LiveRequest(submit.request_id, submit.prompt_token_ids, submit.sampling, stream, times)
        self.submits[submit.request_id] = submit
        self.tokens[submit.request_id] = []
        first = self.live.add(request)
        self.give([] if first is None else [first])

    def abort(self, request_id: str) -> None:
        if self.live.get(request_id) is None:
            return
        wire_id = self.live.remove(request_id)
        self.ends[request_id] = "abort"
        if wire_id is not None:
            self.engine.abort(wire_id)
            self.give(self.live.to_resume())

    def step(self) -> None:
        for output in self.engine.step():
            received = self.live.receive(output)
            assert received is not None, "nothing is aborted in the middle of a step"
            self.note(received[1])
        if self.live.on_probation is not None:
            self.give(self.live.to_resume())

    def note(self, output: TokenOutput) -> None:
        assert output.request_id not in self.ends
        self.tokens[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            self.ends[output.request_id] = output.finish_reason

    def crash(self) -> None:
        """The engine dies, and another one takes its place."""
        culprit = self.live.engine_lost()
        if culprit is not None:
            self.live.remove(culprit.request_id)
            self.ends[culprit.request_id] = "blamed"
        self.start_engine()


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["ask", "ask", "step", "steps", "crash", "abort"]), min_size=8, max_size=40),
    st.integers(0, 9),
)
def test_each_request_ends_once_with_its_own_tokens(events: list[str], seed: int) -> None:
    chance = random.Random(seed)
    front_end = FrontEnd()
    for number, event in enumerate(events):
        match event:
            case "ask":
                front_end.ask(toy_submit(number, chance.randint(1, 20), chance.randint(1, 20)))
            case "abort" if front_end.submits:
                front_end.abort(chance.choice(list(front_end.submits)))
            case "crash":
                front_end.crash()
            case _:
                for _ in range(1 if event == "step" else 7):
                    front_end.step()
    for _ in range(5000):
        if not len(front_end.live):
            break
        front_end.step()
    assert front_end.ends.keys() == front_end.submits.keys()
    assert front_end.live.prompt_tokens == 0
    for request_id, submit in front_end.submits.items():
        sampling, tokens = submit.sampling, front_end.tokens[request_id]
        expected, reason = toy_completion(
            submit.prompt_token_ids, sampling.seed or 0, sampling.max_tokens, frozenset([EOS_TOKEN_ID])
        )
        if front_end.ends[request_id] in ("abort", "blamed"):
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, front_end.ends[request_id]) == (expected, reason)
