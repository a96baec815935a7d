"""What surrounds every request, as plain ASGI (wrappers that copy the response break disconnects and streaming)."""

import asyncio
import logging
import re
import time
from typing import TYPE_CHECKING
from urllib.parse import unquote
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leanserve.contracts.errors import RequestError
from leanserve.server.errors import BodyTooLargeError, DeadlineError, ErrorReply, error_reply
from leanserve.server.logs import RefusalLog, log_access, log_internal_error, printable
from leanserve.server.metrics import HttpCounts
from leanserve.server.request_facts import PROBE_PATHS, RequestFacts, facts_of
from leanserve.server.statistics import Phase

if TYPE_CHECKING:
    from leanserve.server.tracing import Tracing

__all__ = ["BodyLimit", "ClientLeft", "RequestBoundary", "refuse_unread"]

logger = logging.getLogger("leanserve.server")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_AUTHORITY = re.compile(rb"https?://[^/]*", re.IGNORECASE)
_LINGER_S = 1.0
"""A refused body is still read for so long: a client busy sending would lose the answer to a closed connection."""


class RequestBoundary:
    """Gives a request its id, logs it without its content, and turns whatever escapes into a 500 that says nothing.

    Args:
        tracing: is told of every request when it has ended; None: nobody is.
    """

    def __init__(self, app: ASGIApp, counts: HttpCounts, tracing: "Tracing | None") -> None:
        self._app = app
        self._counts = counts
        self._tracing = tracing
        self._refusals = RefusalLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _drop_authority(scope)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        facts = scope["leanserve"] = RequestFacts(request_id, time.perf_counter())
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientLeft as left:
            facts.left_in = left.phase
        except ClientDisconnect:
            facts.left_in = "body"
        except Exception as error:
            log_internal_error(error, request_id)
            if status == 0:
                await error_reply(error).response()(scope, receive, send_with_id)
            else:
                raise RuntimeError("an answer broke off; the cause is logged above") from None
        finally:
            self._note(scope, facts, status or 499)

    def _note(self, scope: Scope, facts: RequestFacts, status: int) -> None:
        route: str = getattr(scope.get("route"), "path", "none")
        self._counts.responses[route, status] += 1
        if facts.error_code is not None:
            self._counts.errors[facts.error_code] += 1
        if facts.left_in is not None:
            self._counts.disconnects[facts.left_in] += 1
        if self._tracing is not None:
            self._tracing.record(scope, facts, status)
        self._tell(scope["path"], facts, status, (time.perf_counter() - facts.arrived_at) * 1000)
        log_access(
            id=facts.request_id,
            client=scope["client"][0] if scope.get("client") else None,
            key=facts.key,
            method=printable(scope["method"]),
            path=printable(scope["path"]),
            status=status,
            error=facts.error_code,
            duration_ms=round((time.perf_counter() - facts.arrived_at) * 1000, 1),
            prompt_tokens=facts.prompt_tokens,
            completion_tokens=facts.completion_tokens,
        )

    def _tell(self, path: str, facts: RequestFacts, status: int, duration_ms: float) -> None:
        extra = {
            "event": "request_ended",
            "request_id": facts.request_id,
            "answer_id": facts.answer_id,
            "status": status,
            "error": facts.error_code,
            "duration_ms": round(duration_ms, 1),
        }
        if facts.failure is None or path in PROBE_PATHS:
            logger.debug("request %s ended with %d after %.0f ms", facts.request_id, status, duration_ms, extra=extra)
        elif (status, facts.error_code) == (503, "overloaded"):
            self._refusals.note(facts.request_id, facts.failure)
        else:
            extra["event"] = "request_failed"
            logger.warning("request %s failed and was ended: %s", facts.request_id, facts.failure, extra=extra)


def _drop_authority(scope: Scope) -> None:
    """`GET http://host/path`, as clients write to proxies, asks a server for `/path` (RFC 9112, 3.2.2)."""
    raw_path: bytes = scope["raw_path"]
    if authority := _AUTHORITY.match(raw_path):
        scope["raw_path"] = raw_path[authority.end() :] or b"/"
        scope["path"] = unquote(scope["raw_path"].decode("ascii"))


class ClientLeft(ClientDisconnect):
    """The client went away while its requests were at the engine."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.phase: Phase = phase


class BodyLimit:
    """Refuses bodies that are too long, declared or chunked, too slow, or of two lengths, before they are kept."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:  # a proxy may take it for another request
            ambiguous = RequestError("Content-Length and Transfer-Encoding are both given; send one of them")
            await refuse_unread(error_reply(ambiguous), scope, receive, send)
            return
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._max_bytes):
            await refuse_unread(error_reply(BodyTooLargeError(self._max_bytes)), scope, receive, send)
            return
        seen = 0
        is_complete = False
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        refusal: ErrorReply | None = None

        async def limited_receive() -> Message:
            nonlocal seen, is_complete
            if is_complete:  # from here on it only tells of a disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise _Refused(
                    DeadlineError(f"the body had not arrived after {self._timeout_s:g} s", code="timeout")
                ) from None
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise _Refused(BodyTooLargeError(self._max_bytes))
            is_complete = not message.get("more_body", False)
            return message

        try:
            await self._app(scope, limited_receive, send)
        except _Refused as error:
            refusal = error_reply(error.reason)
        if refusal is not None:
            await refuse_unread(refusal, scope, receive, send)


class _Refused(BaseException):
    """Passes through every handler of the application, which has not begun to answer while it reads the body."""

    def __init__(self, reason: Exception) -> None:
        super().__init__()
        self.reason = reason


async def refuse_unread(reply: ErrorReply, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body is here, go on reading for a moment, then close the connection."""
    facts = facts_of(scope)
    facts.error_code, facts.failure = reply.code, reply.failure
    response = reply.response()
    response.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": reply.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    try:
        async with asyncio.timeout(_LINGER_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
