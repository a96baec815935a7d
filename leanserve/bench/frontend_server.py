"""The server under measurement: our front end, or a bare StreamingResponse under the same HTTP server.

`python -m leanserve.bench.frontend_server bare|leanserve ENGINE_ADDRESS TOKENS CORE` prints its port when it listens.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from leanserve.bundled import bundled_model_dir
from leanserve.server.app import create_app
from leanserve.server.engine_client import EngineClient
from leanserve.server.http_server import bind_socket
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer

__all__ = ["LONGEST_HOLD_PATH", "main"]

LONGEST_HOLD_PATH = "/longest-hold"

_CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
    b'"model":"bench","choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null,'
    b'"stop_reason":null}]}\n\n'
)


class LoopWatch:
    """How long the event loop was held at most since somebody last asked."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await asyncio.sleep(0.001)
            self.longest_s = max(self.longest_s, loop.time() - began - 0.001)

    async def answer(self, _: Request) -> Response:
        longest_s, self.longest_s = self.longest_s, 0.0
        return JSONResponse({"longest_s": longest_s})


def _bare(num_tokens: int) -> Starlette:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(num_tokens):
            yield _CHUNK
        yield b"data: [DONE]\n\n"

    async def answer(request: Request) -> Response:
        await request.body()
        return StreamingResponse(chunks(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])])


async def _serve(kind: str, address: str, num_tokens: int) -> None:
    watch = LoopWatch()
    client = EngineClient(address, max_queued_tokens=1 << 40)
    if kind == "bare":
        app: Starlette = _bare(num_tokens)
    else:
        client.start()
        tokenizer = Tokenizer.from_dir(bundled_model_dir())
        app = create_app(client, tokenizer, ServerSettings(model_names=("bench",)))
        await client.engine.wait_ready()
    app.router.routes.append(Route(LONGEST_HOLD_PATH, watch.answer))
    listener = bind_socket("127.0.0.1", 0)
    watching = asyncio.create_task(watch.run())
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False)
    print(listener.getsockname()[1], flush=True)
    await uvicorn.Server(config).serve(sockets=[listener])
    watching.cancel()


def main() -> None:
    kind, address, num_tokens, core = sys.argv[1:]
    if hasattr(os, "sched_setaffinity") and int(core) >= 0:
        os.sched_setaffinity(0, {int(core)})
    asyncio.run(_serve(kind, address, int(num_tokens)))


if __name__ == "__main__":
    main()
