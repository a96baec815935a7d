"""The one place where errors become HTTP: a status, headers, and OpenAI's error object."""

from dataclasses import dataclass, field

import orjson
import pydantic
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from leanserve.contracts.errors import EngineError, LeanServeError, OverloadedError, RequestError
from leanserve.server.request_facts import facts_of

__all__ = [
    "BodyTooLargeError",
    "BusyKeyError",
    "DeadlineError",
    "DeadlyRequestError",
    "ErrorReply",
    "NotFoundError",
    "UnauthorizedError",
    "error_reply",
    "plain_reply",
    "validation_error",
]

_MAX_MESSAGE_CHARS = 1000
_MAX_ERRORS_NAMED = 10


class NotFoundError(RequestError):
    """No such model or route."""


class BodyTooLargeError(RequestError):
    """The request body is longer than this server reads."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the request body is longer than {limit_bytes} bytes, the limit", code="request_too_large")


class DeadlineError(RequestError):
    """The request did not arrive in time."""


class DeadlyRequestError(EngineError):
    """Engines die of this request."""


class UnauthorizedError(RequestError):
    """No key, or one that this server does not know."""

    def __init__(self) -> None:
        super().__init__(
            "this server wants an API key that it knows: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
        )


class BusyKeyError(RequestError):
    """One key has as many requests in flight as one may have."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"this API key has {limit} requests in flight, the limit; wait for one to end", code="rate_limit_exceeded"
        )


@dataclass(frozen=True)
class ErrorReply:
    """An error as a client sees it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def failure(self) -> str | None:
        """For the log: the message, where the client is not to blame. It quotes no input."""
        return self.message if self.type == "server_error" or self.status == 408 else None

    def body(self) -> dict[str, object]:
        message = self.message
        if len(message) > _MAX_MESSAGE_CHARS:
            message = message[:_MAX_MESSAGE_CHARS] + "..."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return _ErrorResponse(self)


class _ErrorResponse(Response):
    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(orjson.dumps(reply.body()), reply.status, reply.headers, media_type="application/json")
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        facts = facts_of(scope)
        facts.error_code, facts.failure = self._reply.code, self._reply.failure
        await super().__call__(scope, receive, send)


def error_reply(error: Exception) -> ErrorReply:
    """Map any exception. Errors that are not ours say nothing of what went wrong inside."""
    match error:
        case UnauthorizedError():
            challenge = {"WWW-Authenticate": "Bearer"}
            return ErrorReply(401, str(error), "authentication_error", code=error.code, headers=challenge)
        case BusyKeyError():
            return ErrorReply(429, str(error), "rate_limit_error", code=error.code, headers={"Retry-After": "1"})
        case RequestError():
            statuses = {NotFoundError: 404, DeadlineError: 408, BodyTooLargeError: 413}
            status = next((statuses[kind] for kind in type(error).__mro__ if kind in statuses), 400)
            return ErrorReply(status, str(error), param=error.param, code=error.code)
        case OverloadedError():
            retry = {"Retry-After": str(error.retry_after_s)}
            return ErrorReply(503, str(error), "server_error", code="overloaded", headers=retry)
        case DeadlyRequestError():
            # Clients that try again by themselves would bring the engine down again and again.
            return ErrorReply(
                500, str(error), "server_error", code="deadly_request", headers={"x-should-retry": "false"}
            )
        case EngineError():
            return ErrorReply(503, str(error), "server_error", code="engine_unavailable", headers={"Retry-After": "5"})
        case LeanServeError() | _:
            return ErrorReply(500, "internal error; the server's log has the details", "server_error", code="internal")


def plain_reply(status: int, detail: str, headers: dict[str, str] | None = None) -> ErrorReply:
    """An error of the router (404 for a path, 405 for a method) or of HTTP itself (400, 408)."""
    code = {404: "not_found", 405: "method_not_allowed", 408: "timeout"}.get(status)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorReply(status, detail, kind, code=code, headers=headers or {})


def validation_error(error: pydantic.ValidationError, expected: dict[str, str]) -> RequestError:
    """A body that pydantic refused, in one message that does not repeat the input.

    Args:
        expected: for fields of several types, what they may hold; pydantic lists a failure for each type instead.
    """
    found = error.errors(include_input=False, include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return RequestError(
            f"the body is not JSON: {found[0]['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if not found[0]["loc"]:
        return RequestError("the body must be a JSON object", code="invalid_type")
    messages: dict[str, str] = {}
    for entry in found:
        name = str(entry["loc"][0])
        place = ".".join(str(part) for part in entry["loc"])
        said = f"must be {expected[name]}" if name in expected else f"is wrong: {entry['msg']}"
        messages.setdefault(name if name in expected else place, said)
    named = [f"{place} {message}" for place, message in list(messages.items())[:_MAX_ERRORS_NAMED]]
    if len(messages) > _MAX_ERRORS_NAMED:
        named.append(f"and {len(messages) - _MAX_ERRORS_NAMED} more")
    code = "missing_field" if found[0]["type"] == "missing" else "invalid_type"
    return RequestError("; ".join(named), param=str(found[0]["loc"][0]), code=code)
