"""A port, and uvicorn on it: h11 (which limits headers), nobody's signal handlers, an end within bounded time."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Generator
from http import HTTPStatus
from typing import Any

import h11
import orjson
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from leanserve.contracts.errors import ConfigError
from leanserve.server.errors import plain_reply
from leanserve.server.logs import SeldomTold
from leanserve.server.serving import Serving

__all__ = ["bind_socket", "serve_http"]

logger = logging.getLogger("leanserve.server")

_MAX_HEADER_BYTES = 32 << 10
_IDLE_CONNECTION_S = 75
"""Longer than the 60 s after which load balancers drop idle connections: the server must not be the first to close."""
_UNREAD_MS = 120_000
"""A connection whose peer has taken nothing for so long is cut by the kernel."""
_CLOSE_S = 2
"""For connections to close once no request is live."""
_BACKLOG = 2048


def bind_socket(host: str, port: int) -> socket.socket:
    """Take the port, before anything slow begins. Connections wait until `serve_http` answers them.

    Args:
        port: 0 takes a free one; `getsockname()` tells it.

    Raises:
        ConfigError: the port is taken or not allowed, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must be from 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host {host!r}, port {port} is not an address: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        listener.bind(address)
        listener.listen(_BACKLOG)  # only this shuts others out: two sockets may be bound to one port
    except OSError as error:
        listener.close()
        raise ConfigError(_why_not(error, host, port)) from error
    listener.setblocking(False)
    return listener


def _why_not(error: OSError, host: str, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {port} on {host} is taken, perhaps by another server still running here (to see it: "
                f"lsof -i :{port}); stop it, or choose another port with --port"
            )
        case errno.EACCES:
            return f"port {port} needs more rights than this user has; choose one of 1024 or above with --port"
        case errno.EADDRNOTAVAIL:
            return f"{host} is not an address of this machine; use 127.0.0.1, 0.0.0.0 or one of its own with --host"
        case _:
            return f"cannot listen on {host}, port {port}: {error}"


async def serve_http(
    app: FastAPI,
    listener: socket.socket,
    *,
    stop: asyncio.Event,
    hurry: asyncio.Event | None = None,
    grace_s: float = 30.0,
) -> None:
    """Serve until `stop` is set; then refuse new requests, let live ones finish, and close.

    Signal handlers are the caller's: set `stop` from them.

    Args:
        hurry: ends the wait for live requests.
        grace_s: after so long, requests still live get an error. A few seconds later this returns, whatever clients do.
    """
    serving: Serving = app.state.serving

    class Protocol(_Protocol):
        head_timeout_s = serving.settings.body_timeout_s

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=_CLOSE_S,
        backlog=_BACKLOG,
    )
    asyncio.get_running_loop().set_exception_handler(_LoopErrors())
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    warming = asyncio.create_task(serving.start())
    try:
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        await serving.drain(grace_s, hurry or asyncio.Event())
    finally:
        server.should_exit = True
        stopping.cancel()
        await running
        await warming
        await serving.close()


class _LoopErrors:
    """Tells of what the event loop meets. Without a free file descriptor it meets that 2,048 times a second."""

    def __init__(self) -> None:
        self._accepts = SeldomTold()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, ValueError) and "_start_serving" in context["message"]:
            return  # a second later asyncio would accept again, on a listener that is closed by now
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE) and "socket" in context):
            loop.default_exception_handler(context)
        elif self._accepts.others() is not None:
            logger.error(
                "no connection can be accepted (%s), new clients wait; let this process open more files, with "
                "ulimit -n or systemd's LimitNOFILE",
                error.strerror,
                extra={"event": "accept_failed"},
            )


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Protocol(H11Protocol):
    """Answers what is not HTTP with our error object too, and does not wait for ever for the head of a request."""

    head_timeout_s: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_deadline: asyncio.TimerHandle | None = None
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_deadline()
        elif self._head_deadline is None:  # a later request's first bytes
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_deadline = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _cancel_deadline(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _head_is_late(self) -> None:
        waiting, _ = self.conn.trailing_data
        if not waiting:  # opened ahead of need: an answer to nothing would be taken for the next request's
            self.transport.close()
            return
        self._refuse(408, f"the head of the request had not arrived after {self.head_timeout_s:g} s")

    def _unsupported_upgrade_warning(self) -> None:
        """Clients that offer HTTP/2 or WebSocket are served without; that is worth no line in the log."""

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = orjson.dumps(plain_reply(status, message).body())
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
