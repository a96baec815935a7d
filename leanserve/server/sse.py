"""Server-sent events: frames, keep-alives, and an end that always says how it ended."""

import asyncio
import time
from collections.abc import AsyncIterator

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from leanserve.contracts.errors import LeanServeError
from leanserve.server.answer import Answer
from leanserve.server.errors import error_reply
from leanserve.server.logs import log_internal_error
from leanserve.server.metrics import HttpCounts
from leanserve.server.output_stream import OutputStream
from leanserve.server.request_facts import RequestFacts, facts_of

__all__ = ["EventStream"]

_KEEP_ALIVE = b": keep-alive\n\n"
_FRAMES_AT_ONCE = 16
_DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """An answer as a stream of events. Its requests end with it, however it ends."""

    def __init__(self, answer: Answer, outputs: OutputStream, keep_alive_s: float, counts: HttpCounts) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _progress_and_events(answer, outputs, keep_alive_s) if answer.tells_progress else None
        events = events or _events(answer, outputs, keep_alive_s)
        super().__init__(self._ended_clearly(events), headers=headers, media_type="text/event-stream")
        self._facts: RequestFacts | None = None
        self._outputs = outputs
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._facts = facts_of(scope)
        self._counts.open_streams += 1
        try:
            await super().__call__(scope, receive, send)
        finally:  # a disconnect cancels the sending and leaves the generator where it stands
            self._counts.open_streams -= 1
            if not self._outputs.finished:
                self._facts.left_in = self._outputs.phase
                self._outputs.abort()

    async def _ended_clearly(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """All events, then [DONE].

        A failure becomes an error frame: clients take a stream that merely ends for a success.
        """
        try:
            async for event in events:
                yield event
        except Exception as error:
            facts = self._facts
            assert facts is not None, "it is sent by __call__"
            if not isinstance(error, LeanServeError):
                log_internal_error(error, facts.request_id)
            reply = error_reply(error)
            facts.error_code, facts.failure = str(reply.code), reply.failure
            yield _frame(reply.body())
        yield _DONE


def _frame(content: dict[str, object]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _events(answer: Answer, outputs: OutputStream, keep_alive_s: float) -> AsyncIterator[bytes]:
    """One frame for each token, then the usage if asked for; a comment after each `keep_alive_s` of silence.

    Frames of tokens that are here together (of several choices, or because this process is behind) leave together: a
    write costs more than a frame.
    """
    frames: list[bytes] = []
    async for piece in answer.read(outputs, keep_alive_s):
        if piece is None:
            frames.append(_comment(answer, outputs))
        elif piece.is_prompt:  # it may be long
            frames.append(_frame(await asyncio.to_thread(answer.chunk, piece)))
        else:
            frames.append(_frame(answer.chunk(piece)))
        if not outputs.has_unread or len(frames) == _FRAMES_AT_ONCE:
            yield b"".join(frames)
            frames.clear()
    if frames:  # what was unread came after a stop string, and was dropped
        yield b"".join(frames)
    if answer.includes_usage:
        yield _frame(answer.usage_chunk())


async def _progress_and_events(answer: Answer, outputs: OutputStream, keep_alive_s: float) -> AsyncIterator[bytes]:
    """The same, with a chunk whenever prompts have come further, the last one when all are done."""
    began = time.perf_counter() if outputs.arrived_at is None else outputs.arrived_at
    told: dict[str, int] | None = None
    outputs.wakes_on_progress = True
    async for piece in answer.read(outputs, keep_alive_s):
        progress = answer.progress(outputs)
        if progress != told:
            told = progress
            yield _frame(answer.progress_chunk(progress, (time.perf_counter() - began) * 1000))
        elif piece is None:
            yield _comment(answer, outputs)
        if piece is not None:
            yield _frame(await asyncio.to_thread(answer.chunk, piece) if piece.is_prompt else answer.chunk(piece))
    if answer.includes_usage:
        yield _frame(answer.usage_chunk())


def _comment(answer: Answer, outputs: OutputStream) -> bytes:
    if not outputs.progress:
        return _KEEP_ALIVE
    progress = answer.progress(outputs)
    return b": prefill %d/%d\n\n" % (progress["processed"], progress["total"])
