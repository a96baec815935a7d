"""Who may ask: API keys, compared by digest, before anything of a request is looked at but its path and one header."""

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from leanserve.contracts.errors import ConfigError
from leanserve.server.errors import BusyKeyError, UnauthorizedError, error_reply
from leanserve.server.middleware import refuse_unread
from leanserve.server.page import Page
from leanserve.server.request_facts import PROBE_PATHS, facts_of

__all__ = ["KeyGate", "key_digests", "read_key_file"]

_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{8,512}")
"""What may stand in a bearer header (RFC 6750), and is not guessed in an afternoon."""


def key_digests(keys: Sequence[str]) -> tuple[bytes, ...]:
    """SHA-256 of each key, none twice; the keys themselves are not kept.

    Raises:
        ConfigError: a key that no client could send, or that is too short. The message does not repeat it.
    """
    for place, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"API key number {place} cannot be used: a key has 8 to 512 of the characters A-Z a-z 0-9 . _ ~ + / = -"
            )
    return tuple(dict.fromkeys(_digest(key) for key in keys))


def read_key_file(path: Path) -> list[str]:
    """The keys in a file, one a line; empty lines and lines that begin with # do not count.

    Raises:
        ConfigError: the file cannot be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"the key file {path} holds no key; write one a line")
    return keys


class KeyGate:
    """Lets a request through that shows a key (`Authorization: Bearer ...`); all else is answered 401.

    Every path is closed but `PROBE_PATHS` (compared as the router compares, byte for byte), known or not, so that
    nothing can be found out by asking. The page at `/` is shown beside its 401: it has a field for the key.

    Args:
        digests: from `key_digests`, at least one.
        max_requests_per_key: POSTs of one key that may be in flight; more are answered 429. None: no limit.
        page: what a browser gets that asks for `/` without a key.
    """

    def __init__(self, app: ASGIApp, digests: Sequence[bytes], max_requests_per_key: int | None, page: Page) -> None:
        assert digests
        self._app = app
        self._digests = tuple(digests)
        self._max_requests_per_key = max_requests_per_key
        self._page = page
        self._in_flight: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBE_PATHS:  # nothing but HTTP is served
            await self._app(scope, receive, send)
            return
        digest = self._recognise(Headers(scope=scope).getlist("authorization"))
        if digest is None:
            reply = error_reply(UnauthorizedError())
            if (scope["method"], scope["path"]) == ("GET", "/"):
                await self._page.response(reply.status, reply.headers)(scope, receive, send)
            else:
                await refuse_unread(reply, scope, receive, send)
            return
        facts_of(scope).key = digest.hex()[:8]
        if scope["method"] != "POST" or self._max_requests_per_key is None:
            await self._app(scope, receive, send)
            return
        if self._in_flight[digest] >= self._max_requests_per_key:
            await refuse_unread(error_reply(BusyKeyError(self._max_requests_per_key)), scope, receive, send)
            return
        self._in_flight[digest] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[digest] -= 1

    def _recognise(self, headers: list[str]) -> bytes | None:
        """The digest of the key that the one Authorization header shows. Every known key is compared, always."""
        scheme, _, shown = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        digest = _digest(shown.strip())
        found: bytes | None = None
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
