"""One HTTP/1.1 request on a connection of its own, its response with the time each piece arrived.

The clock is read before anything is parsed, and what arrives together is read off all sockets before any of it is
parsed: a piece's time says when it came, not how busy this client was with its neighbours. Knows no JSON.
"""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

from leanserve import __version__
from leanserve.contracts.errors import ConfigError

__all__ = ["Address", "Body", "Exchange", "Inbox", "TransportError", "exchange", "fetch"]

_SLOW_READER_BUFFER_BYTES = 4096


class TransportError(Exception):
    """The connection failed; `kind` is a short word for counting. The message does not say whose it was."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    path: str
    """In front of every route; empty or "/something"."""
    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every request."""

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> "Address":
        """Read a URL. A trailing /v1 is dropped, since routes carry it.

        Raises:
            ConfigError: it is no http or https URL.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"{url!r} is not the URL of a server; give one such as http://127.0.0.1:8000")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        path = parts.path.rstrip("/").removesuffix("/v1")
        headers = (("Authorization", f"Bearer {api_key}"),) if api_key else ()
        return cls(parts.hostname, port or (443 if tls else 80), tls, path, headers)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{self.path}"


class Inbox:
    """What arrived in one turn of the event loop, on any connection, read before any of it is parsed."""

    def __init__(self) -> None:
        self._arrived: list[tuple[_Connection, int, bytes]] = []

    def put(self, connection: "_Connection", arrived_ns: int, data: bytes) -> None:
        """Keep a piece until this turn's sockets are read. An empty one is the end of the connection."""
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._parse)
        self._arrived.append((connection, arrived_ns, data))

    def _parse(self) -> None:
        arrived, self._arrived = self._arrived, []
        for connection, arrived_ns, data in arrived:
            connection.parse(arrived_ns, data)


@dataclass(slots=True)
class Exchange:
    """The times of one request, ns of time.perf_counter, 0 until they have come; and its response's head."""

    begun_ns: int = 0
    connected_ns: int = 0
    sent_ns: int = 0
    """The request was handed to the kernel, or to the socket's buffer if it is long."""
    first_byte_ns: int = 0
    ended_ns: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """Of the response, names in lower case."""


class Body:
    """Collects a response's body."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def add(self, arrived_ns: int, data: bytes) -> None:
        self._pieces.append(data)

    @property
    def content(self) -> bytes:
        return b"".join(self._pieces)


class _Connection(asyncio.Protocol):
    def __init__(
        self,
        inbox: Inbox,
        result: Exchange,
        on_body: Callable[[int, bytes], None],
        read_bytes_per_s: float | None,
        ended: "asyncio.Future[None]",
    ) -> None:
        self._inbox = inbox
        self._result = result
        self._on_body = on_body
        self._read_bytes_per_s = read_bytes_per_s
        self._ended = ended
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._result.connected_ns = time.perf_counter_ns()

    def send(self, request: h11.Request, body: bytes) -> None:
        assert self._transport is not None
        head = self._http.send(request) or b""
        if body:
            self._http.send_with_data_passthrough(h11.Data(data=body))
        self._http.send(h11.EndOfMessage())
        self._transport.writelines((head, body))
        self._result.sent_ns = time.perf_counter_ns()

    def data_received(self, data: bytes) -> None:
        self._inbox.put(self, time.perf_counter_ns(), data)
        if self._read_bytes_per_s is not None and self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(len(data) / self._read_bytes_per_s, self._resume)

    def _resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inbox.put(self, time.perf_counter_ns(), b"")

    def parse(self, arrived_ns: int, data: bytes) -> None:
        if self._ended.done():
            return
        if data and not self._result.first_byte_ns:
            self._result.first_byte_ns = arrived_ns
        try:
            self._http.receive_data(data)
            self._take_events(arrived_ns)
        except h11.RemoteProtocolError as error:
            kind = "protocol" if data else "closed"
            self._fail(kind, f"the connection closed too early: {error}" if not data else str(error))
        except Exception as error:  # of whoever takes the body: the waiting request must end with it
            self._ended.set_exception(error)

    def _take_events(self, arrived_ns: int) -> None:
        while True:
            event = self._http.next_event()
            match event:
                case h11.Response():
                    self._result.status = event.status_code
                    self._result.headers = {k.decode(): v.decode("latin-1") for k, v in event.headers}
                case h11.Data():
                    self._on_body(arrived_ns, bytes(event.data))
                case h11.EndOfMessage():
                    self._result.ended_ns = arrived_ns
                    self._ended.set_result(None)
                    return
                case h11.ConnectionClosed():
                    self._fail("closed", "the connection closed before the response began")
                    return
                case h11.NEED_DATA | h11.PAUSED:
                    return
                case _:  # 100 Continue and its kind
                    pass

    def _fail(self, kind: str, message: str) -> None:
        if not self._ended.done():
            self._ended.set_exception(TransportError(kind, message))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def exchange(
    address: Address,
    inbox: Inbox,
    method: str,
    path: str,
    body: bytes,
    on_body: Callable[[int, bytes], None],
    *,
    headers: tuple[tuple[str, str], ...] = (),
    read_bytes_per_s: float | None = None,
    result: Exchange | None = None,
) -> Exchange:
    """Send one request, and hand every piece of the answer's body to `on_body(arrived_ns, data)`.

    Cancelling it drops the connection.

    read_bytes_per_s: read no faster than this, through a small receive buffer.
    result: filled as things happen, so that a caller who cancels still has it.

    Raises:
        TransportError: the connection could not be made, or broke.
    """
    loop = asyncio.get_running_loop()
    result = result or Exchange()
    result.begun_ns = time.perf_counter_ns()
    ended: asyncio.Future[None] = loop.create_future()
    connection = _Connection(inbox, result, on_body, read_bytes_per_s, ended)
    try:
        try:
            if read_bytes_per_s is None:
                await loop.create_connection(lambda: connection, address.host, address.port, ssl=address.tls)
            else:
                small = await _small_socket(address)
                name = address.host if address.tls else None
                await loop.create_connection(lambda: connection, sock=small, ssl=address.tls, server_hostname=name)
        except ConnectionError as error:  # asyncio's own words name the address, which whoever reads this knows
            raise TransportError("connect", os.strerror(error.errno) if error.errno else str(error)) from None
        except OSError as error:
            raise TransportError("connect", str(error)) from None
        standard = (
            ("Host", f"{address.host}:{address.port}"),
            ("User-Agent", f"leanserve-loadtest/{__version__}"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
            *((("Content-Type", "application/json"), ("Content-Length", str(len(body)))) if body else ()),
        )
        lines = [*standard, *address.headers, *headers]
        connection.send(h11.Request(method=method, target=address.path + path, headers=lines), body)
        await ended
    finally:
        connection.abort()
        if ended.done() and not ended.cancelled():
            ended.exception()
    return result


async def _small_socket(address: Address) -> socket.socket:
    """A connected socket whose kernel takes little beyond what is read."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = found[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_READER_BUFFER_BYTES)
        await loop.sock_connect(made, where)
    except BaseException:
        made.close()
        raise
    return made


async def fetch(
    address: Address, method: str, path: str, body: bytes = b"", *, timeout_s: float = 30.0
) -> tuple[int, bytes]:
    """Status and body of a request whose timing is of no interest.

    Raises:
        TransportError: no answer came, within `timeout_s`.
    """
    collected = Body()
    try:
        async with asyncio.timeout(timeout_s):
            result = await exchange(address, Inbox(), method, path, body, collected.add)
    except TimeoutError:
        raise TransportError("timeout", f"{path} did not answer within {timeout_s:g} s") from None
    return result.status, collected.content
