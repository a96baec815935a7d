"""The engine as the front end uses it: requests in, outputs to their streams; one engine may follow another.

Knows requests as token ids, and the engine as the messages it sends; knows nothing of HTTP or of text. When an engine
dies, live requests wait for the next one and go on where they were.
"""

import asyncio
import logging
import os
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import EngineError
from leanserve.contracts.messages import (
    Configure,
    EngineFailed,
    EngineReady,
    FromEngine,
    FromRank,
    Hello,
    Loading,
    PrefillProgress,
    Pulse,
    RankFailed,
    Shutdown,
    TokenOutput,
    TokenOutputs,
)
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.current_engine import CurrentEngine, EngineLoad, first_line
from leanserve.server.engine_socket import EngineSocket
from leanserve.server.output_stream import OutputStream
from leanserve.server.rank_health import RankHealth
from leanserve.server.request_broker import RequestBroker
from leanserve.server.statistics import RequestStatistics

__all__ = ["EngineClient", "Recovery", "token_bytes"]

_LAST_WORDS_S = 0.1
"""After the engine's connection closes, time for messages that it sent before to arrive."""

_IDS_TOLD = 100
"""Of the requests that lose their engine, in the log."""

logger = logging.getLogger("leanserve.server")


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as the int32 bytes that `Submit` carries."""
    return array("i", token_ids).tobytes()


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What to do when the engine dies."""

    max_restarts: int = 0
    """Within ten minutes; one more failure is final."""
    resume: bool = True
    """Live requests go on at the next engine; otherwise they end with an error at once."""


class EngineClient:
    """Submits requests to the engine and hands its outputs to their streams. Belongs to one event loop.

    Args:
        address: where to bind, `ipc://...`.
        config: given to an engine that asks for it with Hello, which every rank process does first.
        max_queued_tokens: tokens that may wait unread in one stream before its requests are stopped.
        pulse_address: where to bind for what every rank says of itself; needed with `config`.
        step_timeout_s: how long a step, or a rank's silence, may last before `trouble` tells of it.
    """

    def __init__(
        self,
        address: str,
        config: EngineConfig | None = None,
        *,
        max_queued_tokens: int = 1024,
        pulse_address: str | None = None,
        step_timeout_s: float = 120.0,
        recovery: Recovery | None = None,
    ) -> None:
        self.address = address
        self._socket = EngineSocket(address, pulse_address, self)
        self._config = config
        self._recovery = recovery or Recovery()
        self.engine = CurrentEngine(self._recovery.max_restarts)
        self.statistics = RequestStatistics()
        self.health = RankHealth(step_timeout_s)
        self._broker = RequestBroker(self._socket.send, self.statistics)
        self.live = self._broker.live
        self._max_queued_tokens = max_queued_tokens
        self._heard_at = time.monotonic()
        self._configuring: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Bind and begin to listen; call inside the event loop."""
        self._socket.start()

    async def close(self) -> None:
        """End every live request with an error and let go of the sockets. The engine itself is not told."""
        self.fail("the front end is shutting down")
        if self._configuring is not None:
            self._configuring.cancel()
        await self._socket.close()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        on_progress: Callable[[PrefillProgress], None] | None = None,
    ) -> AsyncGenerator[TokenOutput]:
        """Outputs of one request until its finish_reason is set. Close the generator (`aclose`) to stop it early.

        Stop strings are not looked for here: see `TextStream`. `on_progress` is called after each step that computed a
        part of the prompt, but not its end.

        Raises:
            OverloadedError: the engine is still loading, or being started again.
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
        return OutputStream(self._submit, self._broker.abort, self._max_queued_tokens, arrived_at)

    @property
    def live_requests(self) -> int:
        """Requests submitted and not yet ended."""
        return len(self.live)

    @property
    def live_prompt_tokens(self) -> int:
        """Tokens in their prompts."""
        return self.live.prompt_tokens

    @property
    def silent_s(self) -> float:
        """How long the engine has owed us something and sent nothing; 0 when it owes nothing."""
        return time.monotonic() - self._heard_at if self.live else 0.0

    def trouble(self) -> str | None:
        """What keeps the engine from making progress: a rank that is stuck or silent, or work without a step."""
        troubled = self.health.troubled(time.monotonic())
        if troubled:
            return "; ".join(troubled.values())
        if self.silent_s > self.health.step_timeout_s:
            return f"the engine has made no progress for {self.silent_s:.0f} s"
        return None

    def fail(self, message: str) -> None:
        """The engine is gone for good: ends every live request with an EngineError. Whoever waits for the engine is
        told why, and says it: many ranks may have failed of one thing, and the log is to have it once."""
        self.engine.fail(message)
        self._end_live(message)

    def lose(self, message: str) -> None:
        """The engine is gone, say its last message, its connection, or whoever watches its process.

        Another one may come: live requests wait for it. Nothing happens while none is here.
        """
        if not self.engine.is_attached or self.engine.state == "failed":
            return
        restart_in_s = self.engine.lose(message, self.health.gone())
        self.health.forget()
        failure = self.engine.failure or message
        if restart_in_s is None:
            self._end_live(failure)
            return
        self._heard_at = time.monotonic()
        self._broker.engine_lost()
        if not self._recovery.resume:
            self._end_live(failure)
        logger.error(
            "the engine failed: %s; %d live requests wait for restart %d of %d, in %.0f s",
            first_line(failure),
            len(self.live),
            self.engine.budget.used,
            self.engine.budget.max_restarts,
            restart_in_s,
            extra={"event": "engine_lost", "request_ids": [request.request_id for request in self.live][:_IDS_TOLD]},
        )

    def end_all(self, message: str) -> None:
        """End every live request with an EngineError and tell the engine to stop them."""
        for stream in {request.stream for request in self.live}:
            stream.fail(EngineError(message))

    def shut_down_engine(self) -> None:
        """Ask the engine to end every rank; nothing happens when none is connected."""
        self.engine.is_ending = True
        self._socket.send(Shutdown())

    def _submit(self, stream: OutputStream, request_id: str, prompt_token_ids: bytes, sampling: SamplingParams) -> None:
        self.engine.check_ready()
        if not self.live:
            self._heard_at = time.monotonic()
        self._broker.submit(stream, request_id, prompt_token_ids, sampling)

    def _end_live(self, message: str) -> None:
        self._broker.fail_all(f"the engine stopped: {first_line(message)}")

    def on_engine(self, message: FromEngine) -> None:
        self._heard_at = time.monotonic()
        match message:
            case TokenOutputs():
                self.engine.load = EngineLoad.told_by(message)
                self._broker.deliver(message)
            case Hello():
                self._welcome()
            case Loading():
                self.engine.attach()
                self.engine.loading = message
            case EngineReady():
                self.engine.attach()
                if self.engine.state == "restarting":
                    extra = {"event": "engine_back", "attempt": self.engine.attempt}
                    logger.warning("the engine is back; %d live requests go on", len(self.live), extra=extra)
                self.engine.note_ready(message.info)
                self._broker.engine_ready()
            case EngineFailed():
                if self._ends_all(message):
                    logger.debug("the engine failed: %s", message.message, extra={"event": "engine_failed"})
                    self.fail(message.message)
                else:
                    self.engine.note_last_words(message.message)
                    if self.health.ranks:  # others may have more to say of it
                        self._lose_soon()
                    else:
                        self.lose(message.message)

    def on_rank(self, message: FromRank) -> None:
        if isinstance(message, Pulse):
            self.health.hear(message, time.monotonic())
            return
        extra = {"event": "rank_failed", "rank": message.rank}
        level = logging.DEBUG if self._ends_all(message) else logging.ERROR  # as in `fail`
        logger.log(level, "rank %d failed: %s", message.rank, message.message, extra=extra)
        if self._ends_all(message):
            self.fail(f"rank {message.rank}: {message.message}")
        else:
            self.engine.note_last_words(f"rank {message.rank}: {message.message}")

    def _ends_all(self, message: EngineFailed | RankFailed) -> bool:
        """Whether no other engine is to be tried. Where one has served, the options are right: what another lacks, most
        often memory that the dead have not given back yet, may be there for the next."""
        return message.is_final and self.engine.info is None

    def on_unreadable(self) -> None:
        self.fail("it sent a message that cannot be read")

    def on_broken(self, what: str) -> None:
        self.fail(what)

    def on_disconnect(self) -> None:
        self._lose_soon()

    def _lose_soon(self) -> None:
        """Lose the engine, if it is still the same one, when the last words of all ranks have had time to arrive."""

        def lose(attempt: int) -> None:
            if attempt == self.engine.attempt:
                (self.fail if self.engine.is_ending else self.lose)("its connection closed")

        asyncio.get_running_loop().call_later(_LAST_WORDS_S, lose, self.engine.attempt)

    def _welcome(self) -> None:
        """A new engine's first words."""
        self.lose("another engine took its place")
        if self.engine.state == "failed":
            return
        self.engine.attach()
        self.health.forget()  # what ranks of the one before have said since
        if self._config is not None:
            assert self._socket.pulse_address is not None
            configure = Configure(self._config, os.getpid(), self._socket.pulse_address)
            self._configuring = asyncio.get_running_loop().call_later(
                self.engine.configure_in_s, self._socket.send, configure
            )
