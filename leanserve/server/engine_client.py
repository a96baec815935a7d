"""The front end's end of the socket to the engine on rank 0.

Knows requests as token ids, and the engine as the messages it sends; knows nothing of HTTP or of text. The front end
binds, the engine connects, so that a later engine may take the place of one that died.
"""

import asyncio
import logging
import os
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast
from uuid import uuid4

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import EngineError, OverloadedError
from leanserve.contracts.messages import (
    Abort,
    Configure,
    EngineFailed,
    EngineInfo,
    EngineReady,
    FromEngine,
    Hello,
    Loading,
    PrefillProgress,
    Shutdown,
    Submit,
    ToEngine,
    TokenOutput,
    TokenOutputs,
    decode_from_engine,
    encode,
)
from leanserve.contracts.sampling import FinishReason, SamplingParams
from leanserve.server.output_stream import OutputStream
from leanserve.server.statistics import RequestStatistics, RequestTimes

__all__ = ["EngineClient", "EngineLoad", "EngineState", "LiveRequest", "token_bytes"]

EngineState = Literal["loading", "ready", "failed"]

_LAST_WORDS_S = 0.1
"""After the engine's connection closes, time for messages that it sent before to arrive."""

_FAREWELL_MS = 200
"""Longest wait, when closing, for the last messages (a Shutdown) to leave."""

logger = logging.getLogger("leanserve.server")


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as the int32 bytes that `Submit` carries."""
    return array("i", token_ids).tobytes()


@dataclass(frozen=True)
class EngineLoad:
    """What the engine said of itself with its newest step."""

    step: int = 0
    running: int = 0
    waiting: int = 0
    pages_used_per_rank: tuple[int, ...] = ()
    preemptions: int = 0
    pages_cached_per_rank: tuple[int, ...] = ()
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0


@dataclass(eq=False)
class LiveRequest:
    """A request that the engine works on. It holds all that another engine would need to go on with it."""

    request_id: str
    prompt_token_ids: bytes
    sampling: SamplingParams
    stream: OutputStream
    output_token_ids: "array[int]"
    """Every token received so far."""
    times: RequestTimes


class EngineClient:
    """Submits requests to the engine and hands its outputs to their streams. Belongs to one event loop.

    Args:
        address: where to bind, `ipc://...`.
        config: given to an engine that asks for it with Hello, which every rank process does first.
        max_queued_tokens: tokens that may wait unread in one stream before its requests are stopped.
    """

    def __init__(self, address: str, config: EngineConfig | None = None, *, max_queued_tokens: int = 1024) -> None:
        self.address = address
        self._config = config
        self.state: EngineState = "loading"
        self.info: EngineInfo | None = None
        """Known once the engine has been ready."""
        self.loading: Loading | None = None
        """The newest progress report, while loading."""
        self.failure: str | None = None
        """Why the engine failed, while it has."""
        self.load = EngineLoad()
        self.statistics = RequestStatistics()
        self._max_queued_tokens = max_queued_tokens
        self._live: dict[str, LiveRequest] = {}
        self._heard_at = time.monotonic()
        self._connections: set[int] = set()
        self._settled = asyncio.Event()
        self._failed = asyncio.Event()
        self._is_ending = False
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Bind and begin to listen; call inside the event loop."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        monitor = self._socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._socket.bind(self.address)
        self._tasks = [
            asyncio.create_task(self._receive(self._socket), name="engine outputs"),
            asyncio.create_task(self._watch_connection(monitor), name="engine connection"),
        ]

    async def close(self) -> None:
        """End every live request with an error and let go of the socket. The engine itself is not told."""
        self.fail("the front end is shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._socket is not None and self._context is not None:
            self._socket.disable_monitor()
            self._context.destroy(linger=_FAREWELL_MS)
            self._socket = self._context = None

    async def wait_ready(self) -> EngineInfo:
        """Wait until the engine is ready.

        Raises:
            EngineError: it failed instead.
        """
        await self._settled.wait()
        if self.state == "failed" or self.info is None:
            raise EngineError(self.failure or "the engine failed")
        return self.info

    async def wait_failed(self) -> str:
        """Wait until the engine fails; returns why."""
        await self._failed.wait()
        return self.failure or "the engine failed"

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        on_progress: Callable[[PrefillProgress], None] | None = None,
    ) -> AsyncIterator[TokenOutput]:
        """Outputs of one request until its finish_reason is set. Close the generator (`aclose`) to stop it early.

        Stop strings are not looked for here: see `TextStream`. `on_progress` is called after each step that computed a
        part of the prompt, but not its end.

        Raises:
            OverloadedError: the engine is still loading.
            EngineError: the engine failed, before or during the request.
        """
        stream = self.open_stream()
        stream.wakes_on_progress = on_progress is not None
        request_id = request_id or uuid4().hex
        try:
            stream.submit(request_id, token_bytes(prompt_token_ids), sampling)
            while not stream.finished:
                output = await stream.next()
                if output is not None:
                    yield output
                elif on_progress is not None:
                    on_progress(stream.progress[request_id])
        finally:
            stream.abort()

    def open_stream(self, *, arrived_at: float | None = None) -> OutputStream:
        """`arrived_at` is when the requests that will be submitted came in, by `time.perf_counter`; None: now."""
        return OutputStream(self._submit, self._abort, self._max_queued_tokens, arrived_at)

    @property
    def live_requests(self) -> int:
        """Requests submitted and not yet ended."""
        return len(self._live)

    @property
    def live_prompt_tokens(self) -> int:
        """Tokens in their prompts."""
        return sum(request.times.prompt_tokens for request in self._live.values())

    @property
    def silent_s(self) -> float:
        """How long the engine has owed us something and sent nothing; 0 when it owes nothing."""
        return time.monotonic() - self._heard_at if self._live else 0.0

    def fail(self, message: str) -> None:
        """The engine is gone, says whoever watches its process: ends every live request with an EngineError."""
        if self.state != "failed":
            self.state, self.failure = "failed", message
        self._end(list(self._live.values()), message)
        self._settled.set()
        self._failed.set()

    def end_all(self, message: str) -> None:
        """End every live request with an EngineError and tell the engine to stop them."""
        for stream in {request.stream for request in self._live.values()}:
            stream.fail(EngineError(message))

    def shut_down_engine(self) -> None:
        """Ask the engine to end every rank; nothing happens when none is connected."""
        self._is_ending = True
        self._send(Shutdown())

    def check_ready(self) -> None:
        """Raises: OverloadedError while the engine loads, EngineError when it is gone."""
        if self.state == "loading":
            progress = f" ({self.loading.stage}, {self.loading.done} of {self.loading.total})" if self.loading else ""
            raise OverloadedError(f"the model is still loading{progress}; try again soon", retry_after_s=2)
        if self.state == "failed":
            raise EngineError(f"the engine is not running: {_first_line(self.failure)}")

    def _submit(self, stream: OutputStream, request_id: str, prompt_token_ids: bytes, sampling: SamplingParams) -> None:
        self.check_ready()
        assert request_id not in self._live, "request ids are ours and unique"
        if not self._send(Submit(request_id, prompt_token_ids, sampling)):
            raise EngineError("the engine is not connected")
        if not self._live:
            self._heard_at = time.monotonic()
        times = self.statistics.submitted(stream.arrived_at, len(prompt_token_ids) // 4)
        self._live[request_id] = LiveRequest(request_id, prompt_token_ids, sampling, stream, array("i"), times)

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        request = self._live.pop(request_id, None)
        if request is not None:
            self.statistics.ended(request.times, reason)
            self._send(Abort(request_id))

    def _end(self, requests: list[LiveRequest], message: str) -> None:
        ended = [request for request in requests if self._live.pop(request.request_id, None) is not None]
        for request in ended:
            self.statistics.ended(request.times, "error")
        for stream in {request.stream for request in ended}:
            stream.fail(EngineError(f"the engine stopped: {_first_line(message)}"))

    def _send(self, message: ToEngine) -> bool:
        """Send without waiting; False when no engine is connected."""
        if self._socket is None:
            return False
        # Without a high-water mark a send never waits for room, so the future is done when it returns.
        sent = cast("asyncio.Future[Any]", self._socket.send(encode(message), zmq.DONTWAIT))
        assert sent.done()
        return sent.exception() is None

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frame = await socket.recv()
            self._heard_at = time.monotonic()
            try:
                message: FromEngine = decode_from_engine(frame)
            except msgspec.MsgspecError:
                logger.error("a message of %d bytes from the engine cannot be read", len(frame))
                self.fail("it sent a message that cannot be read")
                continue
            match message:
                case TokenOutputs():
                    self._deliver(message)
                case Hello():
                    if self._config is not None:
                        self._send(Configure(self._config, os.getpid()))
                case Loading():
                    self.state, self.loading, self.failure = "loading", message, None
                    self._settled.clear()
                    self._failed.clear()
                case EngineReady():
                    self.state, self.info, self.loading, self.failure = "ready", message.info, None, None
                    self._settled.set()
                case EngineFailed():
                    logger.error("the engine failed: %s", message.message)
                    self.fail(message.message)

    def _deliver(self, message: TokenOutputs) -> None:
        self.load = EngineLoad(
            message.step,
            message.running,
            message.waiting,
            message.pages_used_per_rank,
            message.preemptions,
            message.pages_cached_per_rank,
            message.prefix_queried_tokens,
            message.prefix_hit_tokens,
        )
        if message.step_report is not None:
            self.statistics.reported(message.step_report)
        now = self.statistics.step()
        for progress in message.prefills:
            if (request := self._live.get(progress.request_id)) is not None:
                self.statistics.scheduled(request.times)
                request.stream.put_progress(progress)
        for output in message.outputs:
            request = self._live.get(output.request_id)
            if request is None:  # aborted while this was on its way
                continue
            request.output_token_ids.extend(output.token_ids)
            if output.token_ids:
                self.statistics.delivered(request.times, len(output.token_ids), output.cached_tokens, now)
            if output.finish_reason is not None:
                del self._live[output.request_id]
                self.statistics.ended(request.times, output.finish_reason)
            request.stream.put(output)

    async def _watch_connection(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            event = await cast("Any", recv_monitor_message(monitor))
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._connections.add(event["value"])
                continue
            self._connections.discard(event["value"])
            orphans = list(self._live.values())
            await asyncio.sleep(_LAST_WORDS_S)
            if not self._connections and self.state != "failed":
                if not self._is_ending:
                    logger.error("the engine's connection closed")
                self.fail("its connection closed")
            else:
                self._end(orphans, "its connection closed")


def _first_line(message: str | None) -> str:
    """What a client may know of a failure; the log has the rest."""
    return (message or "no reason given").partition("\n")[0]
