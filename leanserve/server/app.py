"""Puts the HTTP face together."""

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from leanserve import __version__
from leanserve.contracts.errors import LeanServeError
from leanserve.server.auth import KeyGate
from leanserve.server.chat_template import ChatTemplate
from leanserve.server.engine_client import EngineClient
from leanserve.server.errors import error_reply, plain_reply
from leanserve.server.middleware import BodyLimit, RequestBoundary
from leanserve.server.routes import build_router
from leanserve.server.serving import Serving
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from leanserve.server.tracing import Tracing

__all__ = ["create_app"]


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer | None,
    settings: ServerSettings,
    chat_template: ChatTemplate | None = None,
    tracing: "Tracing | None" = None,
) -> FastAPI:
    """The ASGI application. `app.state.serving` is its `Serving`.

    Args:
        client: started, in the event loop that will serve the application.
        tokenizer: None serves token ids only.
        settings: names and limits.
        chat_template: None: the chat route says that there is none.
        tracing: where spans go; None: there are none.
    """
    serving = Serving(client, tokenizer, settings, chat_template)
    app = FastAPI(
        title="LeanServe",
        version=__version__,
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.serving = serving
    app.include_router(build_router(serving))
    app.add_exception_handler(LeanServeError, _ours)
    app.add_exception_handler(HTTPException, _of_the_router)
    app.add_exception_handler(RequestValidationError, _of_a_path)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    if settings.key_digests:
        app.add_middleware(
            KeyGate,
            digests=settings.key_digests,
            max_requests_per_key=settings.max_requests_per_key,
            page=serving.page,
        )
    if settings.cors_origins:  # outside the gate: browsers ask without a key whether they may send one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type", "X-Request-Id"),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    app.add_middleware(RequestBoundary, counts=serving.counts, tracing=tracing)  # the outermost
    return app


async def _ours(_: Request, error: Exception) -> Response:
    return error_reply(error).response()


async def _of_the_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return plain_reply(error.status_code, detail, dict(error.headers or {})).response()


async def _of_a_path(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return plain_reply(400, "a parameter in the path or the query is wrong").response()
