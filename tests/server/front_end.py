"""The whole front end on a real port, with an EchoEngine behind it, inside the test's event loop."""

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import httpx
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from leanserve.server.app import create_app
from leanserve.server.chat_template import ChatTemplate
from leanserve.server.engine_client import EngineClient
from leanserve.server.http_server import bind_socket, serve_http
from leanserve.server.serving import Serving
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer
from leanserve.server.tracing import Tracing
from server.echo_engine import EchoEngine

PATIENCE_S = 120
"""For what comes at once on an idle machine."""


@dataclass
class Live:
    engine: EchoEngine
    client: EngineClient
    serving: Serving
    http: httpx.AsyncClient
    port: int
    stop: asyncio.Event
    served: "asyncio.Task[None]"

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json=body)

    async def chat(self, *messages: Any, **body: Any) -> httpx.Response:
        """A conversation; a string is a user's message."""
        said = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
        return await self.http.post("/v1/chat/completions", json={"messages": said, **body})

    async def chunks(self, **body: Any) -> list[dict[str, Any]]:
        """A stream's data, without [DONE], which is checked to be there."""
        response = await self.http.post("/v1/completions", json={"stream": True, **body})
        assert response.status_code == 200, response.text
        return parse_events(response.text)

    async def quiet(self) -> None:
        """Wait until nothing is live on either side, and the server has done with every request."""
        await until(lambda: not (self.client.live_requests or self.engine.running or _requests_under_way()))
        await asyncio.sleep(0.03)  # for what should not come any more


async def until(holds: Callable[[], object]) -> None:
    """Wait for something that comes, sooner or later: a busy machine may take its time."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.002)


def _requests_under_way() -> int:
    """Requests that uvicorn has in hand, each a task of this loop."""
    tasks = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return tasks.count(RequestResponseCycle.run_asgi.__qualname__)


def parse_events(text: str) -> list[dict[str, Any]]:
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames), frames
    assert frames[-1] == "data: [DONE]", frames[-1]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


@contextlib.asynccontextmanager
async def connected(
    max_queued_tokens: int = 1024,
    client_options: dict[str, Any] | None = None,
    *,
    ready: bool = True,
    **engine: Any,
) -> AsyncIterator[tuple[EngineClient, EchoEngine]]:
    """A client and an engine, that has said it is ready or not."""
    directory = tempfile.mkdtemp(prefix="ls-")  # short: ipc addresses end at about 100 characters
    address = f"ipc://{directory}/engine"
    client = EngineClient(address, max_queued_tokens=max_queued_tokens, **(client_options or {}))
    client.start()
    echo = EchoEngine(address, **engine)
    try:
        if ready:
            await echo.ready()
            await client.engine.wait_ready()
        yield client, echo
    finally:
        await echo.close()
        await client.close()
        shutil.rmtree(directory)


@contextlib.asynccontextmanager
async def live_server(
    tokenizer: Tokenizer | None = None,
    *,
    ready: bool = True,
    max_queued_tokens: int = 1024,
    grace_s: float = 1.0,
    settings: dict[str, Any] | None = None,
    client_options: dict[str, Any] | None = None,
    chat_template: str | None = None,
    tracing: Tracing | None = None,
    **engine: Any,
) -> AsyncIterator[Live]:
    async with connected(max_queued_tokens, client_options, ready=False, **engine) as (client, echo):
        server_settings = ServerSettings(**{"model_names": ("echo", "org/echo"), **(settings or {})})
        template = None if chat_template is None else ChatTemplate({"default": chat_template}, {"bos_token": "<s>"})
        app = create_app(client, tokenizer, server_settings, template, tracing)
        listener = bind_socket("127.0.0.1", 0)
        port = listener.getsockname()[1]
        stop = asyncio.Event()
        served = asyncio.create_task(serve_http(app, listener, stop=stop, grace_s=grace_s))
        limits = httpx.Limits(max_connections=None)
        # Nothing is encrypted here, and to read the certificates of the world takes longer than most scenarios.
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, limits=limits, verify=False
        ) as http:
            if ready:
                await echo.ready()
                await client.engine.wait_ready()
            yield Live(echo, client, app.state.serving, http, port, stop, served)
        stop.set()
        await served


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario; it fails after some minutes instead of hanging."""
    asyncio.run(asyncio.wait_for(scenario, 2 * PATIENCE_S))
