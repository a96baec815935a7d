"""The engine's loop on rank 0: the front end's messages in, one message of tokens per step out."""

import logging
import time
from collections.abc import Callable, Iterator
from threading import Event

import msgspec
import zmq

from leanserve.contracts.errors import RequestError
from leanserve.contracts.messages import (
    Abort,
    Configure,
    EngineFailed,
    FromEngine,
    Shutdown,
    ToEngine,
    TokenOutput,
    decode_to_engine,
    encode,
)
from leanserve.engine.engine import Engine

__all__ = ["serve"]

logger = logging.getLogger(__name__)

STOP_POLL_MS = 100
"""How often a loop that waits looks whether it should stop."""
IDLE_CHECK_S = 2.0
"""An engine without work looks so often whether every rank is still there."""
MAX_MESSAGES_PER_STEP = 256
"""Bound on the messages applied between two steps: a flood of them does not hold up running streams."""


def serve(
    engine: Engine, socket: zmq.Socket[bytes], stop: Event, *, when_idle: Callable[[], object] = lambda: None
) -> None:
    """Serve until `stop` is set, by a signal handler or by a Shutdown message, or a step fails.

    `socket` is a DEALER whose peer is the front end; one frame is one message. A message that cannot be read, or that
    reuses a live id, is logged and dropped. A front end that does not read holds the engine up once the socket's queues
    are full; no token is lost. When this returns, every request has had its last output; when it raises, none has: the
    front end holds all that the next engine needs to go on with them. `stop` is set either way.

    Args:
        when_idle: called every IDLE_CHECK_S while there is no work.

    Raises:
        Exception: what the step or `when_idle` raised, after the front end was told.
    """
    checked_at = time.monotonic()
    try:
        while not stop.is_set():
            if not engine.has_work and not socket.poll(STOP_POLL_MS) and time.monotonic() - checked_at >= IDLE_CHECK_S:
                when_idle()
                checked_at = time.monotonic()
            answers = [answer for message in _received(socket) if (answer := _apply(message, engine, stop))]
            if answers:
                _send(engine.report(answers), socket, stop)
            if engine.has_work and not stop.is_set():
                _send(engine.report(engine.step()), socket, stop)
        last = engine.collect()
    except Exception as error:
        stop.set()
        _send(EngineFailed(f"{type(error).__name__}: {error}"), socket, stop)
        raise
    _send(engine.report([*last, *engine.fail("the engine is shutting down")]), socket, stop)


def _received(socket: zmq.Socket[bytes]) -> Iterator[ToEngine]:
    """The messages that have arrived; never waits."""
    for _ in range(MAX_MESSAGES_PER_STEP):
        try:
            frame = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
        try:
            yield decode_to_engine(frame)
        except msgspec.MsgspecError as error:
            logger.error("dropped a message of %d bytes that cannot be read: %s", len(frame), error)


def _apply(message: ToEngine, engine: Engine, stop: Event) -> TokenOutput | None:
    """Do what a message says. Returns what is to be answered now: a refusal, or the end of an aborted request."""
    if isinstance(message, Shutdown):
        stop.set()
        return None
    if isinstance(message, Abort):
        return engine.abort(message.request_id)
    if isinstance(message, Configure):
        return None  # it was configured before it was made
    try:
        engine.submit(message)
    except RequestError as error:
        code = error.code or "invalid_value"
        return TokenOutput(
            message.request_id,
            [],
            finish_reason="error",
            error=str(error),
            error_code=code,
            error_param=error.param,
        )
    except ValueError as error:
        extra = {"event": "request_dropped", "request_id": message.request_id}
        logger.error("dropped a request: %s", error, extra=extra)
    return None


def _send(message: FromEngine, socket: zmq.Socket[bytes], stop: Event) -> None:
    """Send as soon as there is room in the socket's queue; give up when the engine has to stop."""
    frame = encode(message)
    while not socket.poll(STOP_POLL_MS, zmq.POLLOUT):
        if stop.is_set():
            logger.error("the front end does not read: its last messages are lost")
            return
    socket.send(frame, zmq.NOBLOCK)
