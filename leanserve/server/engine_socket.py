"""The front end's sockets to the ranks: what comes is decoded and handed over, what goes never waits.

The front end binds, the engine connects, so that a later engine may take the place of one that died.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, cast

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from leanserve.contracts.messages import FromEngine, FromRank, ToEngine, decode_from_engine, decode_from_rank, encode
from leanserve.server.lasting_task import start_lasting

__all__ = ["EngineListener", "EngineSocket"]

_FAREWELL_MS = 1000
"""Longest wait, when closing, for the last messages (a Shutdown) to leave."""

logger = logging.getLogger("leanserve.server")


class EngineListener(Protocol):
    """Who is told what comes. Nothing here may take long: it runs on the event loop."""

    def on_engine(self, message: FromEngine) -> None: ...
    def on_rank(self, message: FromRank) -> None: ...
    def on_disconnect(self) -> None: ...
    def on_unreadable(self) -> None:
        """The engine sent what cannot be read."""

    def on_broken(self, what: str) -> None:
        """Nobody listens any more: what was to be told could not be taken."""


class EngineSocket:
    """Belongs to one event loop.

    Args:
        address: where to bind for the engine, `ipc://...`.
        pulse_address: where to bind for what every rank says of itself; `tcp://host:*` takes a free port.
    """

    def __init__(self, address: str, pulse_address: str | None, listener: EngineListener) -> None:
        self._address = address
        self.pulse_address = pulse_address
        """Where the ranks connect to, once bound."""
        self._listener = listener
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Bind and begin to listen; call inside the event loop."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.bind(self._address)
        self._listen(self._receive(self._socket), "engine outputs")
        self._listen(self._watch_connection(monitor), "engine connection")
        if self.pulse_address is not None:
            pulses = self._context.socket(zmq.PULL)
            pulses.bind(self.pulse_address)
            self.pulse_address = pulses.getsockopt_string(zmq.LAST_ENDPOINT)
            self._listen(self._receive_pulses(pulses), "pulses")

    def send(self, message: ToEngine) -> bool:
        """Send without waiting; False when no engine is connected."""
        if self._socket is None:
            return False
        # Without a high-water mark a send never waits for room, so the future is done when it returns.
        sent = cast("asyncio.Future[Any]", self._socket.send(encode(message), zmq.DONTWAIT))
        assert sent.done()
        return sent.exception() is None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._socket is not None and self._context is not None:
            self._socket.disable_monitor()
            self._context.destroy(linger=_FAREWELL_MS)
            self._socket = self._context = None

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        async for frame in _frames(socket):
            try:
                message: FromEngine = decode_from_engine(frame)
            except msgspec.MsgspecError:
                logger.error("a message of %d bytes from the engine cannot be read", len(frame))
                self._listener.on_unreadable()
                continue
            self._listener.on_engine(message)

    async def _receive_pulses(self, socket: zmq.asyncio.Socket) -> None:
        async for frame in _frames(socket):
            try:
                message: FromRank = decode_from_rank(frame)
            except msgspec.MsgspecError:
                logger.error("a message of %d bytes from a rank cannot be read", len(frame))
                continue
            self._listener.on_rank(message)

    async def _watch_connection(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            await cast("Any", recv_monitor_message(monitor))
            self._listener.on_disconnect()

    def _listen(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(start_lasting(work, name, self._listener.on_broken))


async def _frames(socket: zmq.asyncio.Socket) -> AsyncIterator[bytes]:
    """What comes, in order. Everybody else on the loop has a turn after each: to receive what is there already does not
    wait, and in a burst of steps no reader could take its tokens before the stream has too many."""
    while True:
        yield await socket.recv()
        await asyncio.sleep(0)
