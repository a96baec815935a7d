"""The page at `/`: one file, nothing from elsewhere, and a policy under which a browser runs nothing but that file."""

import base64
import hashlib
import re
from importlib import resources

from starlette.responses import Response

__all__ = ["Page"]


class Page:
    """`page.html`, read once. It holds nothing about this server: what it shows, it asks for with the user's key."""

    def __init__(self) -> None:
        self._html = (resources.files("leanserve.server") / "page.html").read_bytes()
        self._policy = "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hashes(self._html, 'script')}",
                f"style-src {_hashes(self._html, 'style')}",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        )

    def response(self, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        guards = {
            "Content-Security-Policy": self._policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(self._html, status, {**guards, **(headers or {})}, media_type="text/html")


def _hashes(html: bytes, element: str) -> str:
    """The sources of a policy that allow the file's own inline elements alone."""
    bodies = re.findall(rb"<%b>(.*?)</%b>" % (element.encode(), element.encode()), html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in bodies)
