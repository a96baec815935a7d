"""Server-sent events: frames, keep-alives, and an end that always says how it ended."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from leanserve.contracts.errors import LeanServeError
from leanserve.server.answer import Answer
from leanserve.server.errors import error_reply
from leanserve.server.logs import log_internal_error
from leanserve.server.output_stream import OutputStream

__all__ = ["EventStream", "answer_events", "frame"]

_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream of events whose requests end with it, however it ends."""

    def __init__(self, events: AsyncIterator[bytes], outputs: OutputStream, counts: Counter[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._outputs = outputs
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # a disconnect cancels the sending and leaves the generator where it stands
            if not self._outputs.finished:
                self._counts["disconnects"] += 1
                self._outputs.abort()


def frame(content: dict[str, object]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def answer_events(answer: Answer, outputs: OutputStream, keep_alive_s: float) -> AsyncIterator[bytes]:
    """An answer as frames: one for each token, then the usage if asked for, then [DONE].

    A failure becomes an error frame before [DONE]: clients take a stream that merely ends for a success.
    """
    try:
        async for piece in answer.read(outputs, keep_alive_s):
            if piece is None:
                yield _KEEP_ALIVE
            elif piece.is_prompt:  # it may be long
                yield frame(await asyncio.to_thread(answer.chunk, piece))
            else:
                yield frame(answer.chunk(piece))
        if answer.includes_usage:
            yield frame(answer.usage_chunk())
    except Exception as error:
        if not isinstance(error, LeanServeError):
            log_internal_error(error)
        yield frame(error_reply(error).body())
    yield _DONE
