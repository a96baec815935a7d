"""Real engines on the toy model that die at any step, one after the other: what the front end keeps is enough for each
request to end once, with the tokens it gets alone."""

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fake_executors import ToyModelExecutor, toy_completion
from engine.workload import EOS_TOKEN_ID, toy_submit
from leanserve.contracts.batch import Batch
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import EngineError
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Abort, Submit
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.server.output_stream import OutputStream
from leanserve.server.request_broker import RequestBroker
from leanserve.server.statistics import RequestStatistics

SHARDING = KvSharding(page_tokens=4, pages_per_rank=(6, 0, 5))


class MortalExecutor(ToyModelExecutor):
    """The toy model; it raises as soon as a step computes a deadly prompt's fatal position."""

    def __init__(self, sharding: KvSharding) -> None:
        super().__init__(sharding)
        self.deadly: dict[bytes, int] = {}
        """By prompt: the position."""
        self._fatal: dict[int, int] = {}
        """By sequence id."""

    def launch(self, batch: Batch) -> None:
        for new in batch.started:
            position = self.deadly.get(new.token_ids[: 4 * new.num_prompt_tokens])
            if position is not None:
                self._fatal[new.sequence_id] = position
        super().launch(batch)
        for row in batch.rows:
            if row.start <= self._fatal.get(row.sequence_id, -1) < row.start + row.count:
                raise EngineError(f"sequence {row.sequence_id} has ended this engine")


class FrontEnd:
    """Streams and the broker between them and an engine, without sockets.

    Args:
        overlap: steps overlap.
    """

    def __init__(self, *, overlap: bool = False) -> None:
        self.deadly: dict[str, int] = {}
        """By request id: the position whose computation ends the engine, every time."""
        self.overlap = overlap
        self.crashes = 0
        self.broker = RequestBroker(self.send, RequestStatistics())
        self.submits: dict[str, Submit] = {}
        self.streams: dict[str, OutputStream] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.start_engine()

    def start_engine(self) -> None:
        options = BatchOptions(max_batch_tokens=9, max_sequences=3)
        scheduler = Scheduler(SHARDING, options, SHARDING.total_tokens)
        self.executor = MortalExecutor(SHARDING)
        self.engine = Engine(scheduler, self.executor, [EOS_TOKEN_ID], clock=lambda: 0.0, overlap=self.overlap)
        self.broker.engine_ready()

    def send(self, message: Submit | Abort) -> bool:
        if isinstance(message, Submit):
            self.engine.submit(message)
            name = message.request_id.partition("~")[0]
            if name in self.deadly:
                self.executor.deadly[message.prompt_token_ids] = self.deadly[name]
        else:
            self.engine.abort(message.request_id)
        return True

    def ask(self, submit: Submit) -> None:
        stream = OutputStream(self.broker.submit, self.broker.abort, 10_000)
        name = submit.request_id
        self.submits[name], self.streams[name], self.tokens[name] = submit, stream, []
        stream.submit(name, submit.prompt_token_ids, submit.sampling)

    def abort(self, name: str) -> None:
        if name not in self.ends:
            self.streams[name].abort()
            self.ends[name] = "abort"

    async def step(self) -> None:
        try:
            outputs = self.engine.step()
        except EngineError:
            self.crash()
            return
        self.broker.deliver(self.engine.report(outputs))
        for name, stream in self.streams.items():
            while stream.has_unread:
                output = await stream.next()
                assert output is not None
                assert name not in self.ends
                self.tokens[name] += output.token_ids
                if output.finish_reason is not None:
                    self.ends[name] = output.finish_reason

    def crash(self) -> None:
        """The engine dies, and another one takes its place."""
        self.crashes += 1
        before = set(self.broker.live)
        self.broker.engine_lost()
        self.ends |= {blamed.request_id: "blamed" for blamed in before - set(self.broker.live)}
        self.start_engine()


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["ask", "ask", "step", "steps", "crash", "abort"]), min_size=8, max_size=40),
    st.integers(0, 9),
)
def test_each_request_ends_once_with_its_own_tokens(events: list[str], seed: int) -> None:
    front_end = asyncio.run(play(FrontEnd(), events, random.Random(seed)))
    assert front_end.ends.keys() == front_end.submits.keys()
    assert front_end.broker.live.prompt_tokens == 0
    for request_id, submit in front_end.submits.items():
        sampling, tokens = submit.sampling, front_end.tokens[request_id]
        expected, reason = toy_completion(
            submit.prompt_token_ids, sampling.seed or 0, sampling.max_tokens, frozenset([EOS_TOKEN_ID])
        )
        if front_end.ends[request_id] in ("abort", "blamed"):
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, front_end.ends[request_id]) == (expected, reason)


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["ask", "ask", "deadly", "step", "steps", "abort"]), min_size=8, max_size=30),
    st.integers(0, 9),
    st.booleans(),
)
def test_deadly_requests_are_found_and_nobody_else_is_blamed(events: list[str], seed: int, overlap: bool) -> None:
    front_end = asyncio.run(play(FrontEnd(overlap=overlap), events, random.Random(seed)))
    blamed = {name for name, end in front_end.ends.items() if end == "blamed"}
    assert blamed <= front_end.deadly.keys()
    assert {front_end.ends[name] for name in front_end.deadly.keys() - blamed} <= {"abort", "stop"}
    assert front_end.crashes <= 3 * len(front_end.deadly)


async def play(front_end: FrontEnd, events: list[str], chance: random.Random) -> FrontEnd:
    """Let the events happen, and then the engines run until nobody is live."""
    for number, event in enumerate(events):
        match event:
            case "ask":
                front_end.ask(toy_submit(number, chance.randint(1, 20), chance.randint(1, 20)))
            case "deadly":
                prompt_tokens, position = chance.randint(1, 20), chance.randint(0, 23)
                front_end.deadly[f"r{number}"] = position
                front_end.ask(toy_submit(number, prompt_tokens, max(position + 2 - prompt_tokens, 2)))
            case "abort" if front_end.submits:
                front_end.abort(chance.choice(list(front_end.submits)))
            case "crash":
                front_end.crash()
            case _:
                for _ in range(1 if event == "step" else 7):
                    await front_end.step()
    for _ in range(5000):
        if not len(front_end.broker.live):
            break
        await front_end.step()
    return front_end
