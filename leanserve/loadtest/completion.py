"""One request from its intended start to its record."""

import asyncio
import time
from array import array
from collections.abc import Callable, Coroutine

import orjson

from leanserve.loadtest.events import DONE, Usage, error_of, read_event
from leanserve.loadtest.http_stream import Exchange, Inbox, TransportError, exchange
from leanserve.loadtest.record import Outcome, Record
from leanserve.loadtest.sse import SseParser
from leanserve.loadtest.target import Target
from leanserve.loadtest.workload import Turn

__all__ = ["CompletionStream", "complete"]

SLOW_READER_BYTES_PER_S = 2048.0


class CompletionStream:
    """Reads one streamed answer. `on_chunk(arrived_ns, tokens, is_first)` is told of every chunk with tokens."""

    def __init__(self, result: Exchange, on_chunk: Callable[[int, int, bool], None]) -> None:
        self.result = result
        self.arrived_ns = array("q")
        self.tokens = array("q")
        self.texts: list[str] = []
        self.token_ids: list[int] | None = []
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.error: str | None = None
        self.refusal: list[bytes] = []
        """The body, where the status is not 200."""
        self.cancel_after: int | None = None
        self.cancelled = asyncio.Event()
        """Set when `cancel_after` tokens have come."""
        self._on_chunk = on_chunk
        self._sse = SseParser()

    def add(self, arrived_ns: int, data: bytes) -> None:
        """Take a piece of the body."""
        if self.result.status != 200:
            self.refusal.append(data)
            return
        for event in self._sse.feed(data):
            self._take(arrived_ns, event)

    def close(self) -> None:
        """The body has ended."""
        for event in self._sse.close():
            self._take(self.result.ended_ns, event)

    def _take(self, arrived_ns: int, data: bytes) -> None:
        if data == DONE:
            return
        event = read_event(data)
        if event.error is not None:
            self.error = self.error or event.error
        self.usage = event.usage or self.usage
        self.finish_reason = event.finish_reason or self.finish_reason
        if not (count := event.tokens):
            return
        self._on_chunk(arrived_ns, count, not self.arrived_ns)
        self.arrived_ns.append(arrived_ns)
        self.tokens.append(count)
        self.texts.append(event.text)
        if event.token_ids is None:
            self.token_ids = None
        elif self.token_ids is not None:
            self.token_ids += event.token_ids
        if self.cancel_after is not None and len(self.arrived_ns) >= self.cancel_after:
            self.cancelled.set()


async def complete(
    target: Target,
    inbox: Inbox,
    body: bytes,
    turn: Turn,
    *,
    place: tuple[int, int],
    request_id: str,
    intended_ns: int,
    origin_ns: int,
    timeout_s: float,
    on_chunk: Callable[[int, int, bool], None] = lambda arrived_ns, tokens, is_first: None,
) -> Record:
    """Ask, read the answer as it comes, and write down what happened; an error is a record like any other.

    place: index of the conversation, and of the turn in it.
    origin_ns: the run's start on time.perf_counter_ns.
    """
    result = Exchange(begun_ns=time.perf_counter_ns())
    stream = CompletionStream(result, on_chunk)
    outcome: Outcome = "slow" if turn.slow_reader else "ok"
    kind: str | None = None
    message: str | None = None
    try:
        async with asyncio.timeout(timeout_s):
            asking = exchange(
                target.address,
                inbox,
                "POST",
                target.route,
                body,
                stream.add,
                headers=(("X-Request-Id", request_id), ("Accept", "text/event-stream")),
                read_bytes_per_s=SLOW_READER_BYTES_PER_S if turn.slow_reader else None,
                result=result,
            )
            if turn.cancel_after_tokens is None:
                await asking
            elif await _cancelled_early(asking, stream, turn.cancel_after_tokens):
                outcome = "cancelled"
        if outcome != "cancelled":
            stream.close()
            kind, message = _failure(stream)
    except TimeoutError:
        kind, message = "timeout", f"no end within {timeout_s:g} s"
    except TransportError as error:
        kind, message = error.kind, str(error)
    return _record(
        stream,
        Record(
            index=turn.index,
            request_id=request_id,
            conversation=place[0],
            turn=place[1],
            outcome="error" if kind is not None else outcome,
            error_kind=kind,
            error=message,
            intended_s=(intended_ns - origin_ns) / 1e9,
            client_delay_ms=(result.begun_ns - intended_ns) / 1e6,
            prompt_tokens_asked=turn.prompt.tokens,
            output_tokens_asked=turn.output_tokens,
            needle=turn.needle,
        ),
        intended_ns,
    )


async def _cancelled_early(
    asking: Coroutine[None, None, Exchange], stream: CompletionStream, after_tokens: int
) -> bool:
    """Go away after some tokens, 0 being half a second after asking. False: it ended first."""
    stream.cancel_after = after_tokens or None
    request = asyncio.ensure_future(asking)
    enough = asyncio.ensure_future(stream.cancelled.wait() if after_tokens else asyncio.sleep(0.5))
    try:
        await asyncio.wait({request, enough}, return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            request.result()
        return not request.done()
    finally:
        enough.cancel()
        request.cancel()
        await asyncio.gather(request, enough, return_exceptions=True)


def _failure(stream: CompletionStream) -> tuple[str | None, str | None]:
    """Kind and message of what is wrong with an answer that has ended; both None for a good one."""
    if stream.result.status != 200:
        content = b"".join(stream.refusal)
        try:
            message = error_of(orjson.loads(content))
        except (orjson.JSONDecodeError, AttributeError):
            message = None
        return f"http {stream.result.status}", message or content[:500].decode(errors="replace")
    if stream.error is not None:
        return "stream", stream.error
    if not stream.arrived_ns:
        return "empty", "the stream ended without a token"
    if stream.finish_reason is None:
        return "unfinished", "the stream ended without a finish_reason"
    return None, None


def _record(stream: CompletionStream, record: Record, intended_ns: int) -> Record:
    """Fill in times and tokens."""

    def since_intended_ms(at_ns: int) -> float:
        return (at_ns - intended_ns) / 1e6

    result = stream.result
    if result.connected_ns:
        record.connect_ms = (result.connected_ns - result.begun_ns) / 1e6
    if result.first_byte_ns:
        record.first_byte_ms = since_intended_ms(result.first_byte_ns)
    record.chunk_ms = [since_intended_ms(at_ns) for at_ns in stream.arrived_ns]
    record.chunk_tokens = list(stream.tokens)
    if record.chunk_ms:
        record.ttft_ms = record.chunk_ms[0]
        record.last_token_ms = record.chunk_ms[-1]
    if record.error_kind is None and record.outcome != "cancelled":
        record.e2e_ms = record.last_token_ms
    usage = stream.usage
    if usage is not None:
        record.usage_told = usage.completion_tokens is not None
        record.prompt_tokens = usage.prompt_tokens
        record.cached_tokens = usage.cached_tokens
    counted = sum(stream.tokens)
    record.output_tokens = usage.completion_tokens if usage and usage.completion_tokens is not None else counted
    record.finish_reason = stream.finish_reason
    record.text = "".join(stream.texts)
    record.token_ids = stream.token_ids if stream.token_ids else None
    if record.needle is not None and record.outcome in ("ok", "slow"):
        record.needle_found = record.needle in record.text
    return record
