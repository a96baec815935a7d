"""A server of one's own: `leanserve serve` in this very process, for as long as a block lasts."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from socket import socket

from fastapi import FastAPI
from rich.console import Console

from leanserve.launch.banner import show_loading
from leanserve.launch.engine_group import EngineGroup
from leanserve.launch.front_end import BUNDLED_NAME
from leanserve.launch.options import LaunchOptions
from leanserve.launch.run_dir import make_run_dir
from leanserve.server.app import create_app
from leanserve.server.chat_template import ChatTemplate
from leanserve.server.http_server import bind_socket, serve_http
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer

__all__ = ["own_server"]


@contextmanager
def own_server(options: LaunchOptions, console: Console, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve until the block ends, however it ends: then no process, socket or file is left. Gives the server's URL.

    The ranks watch this process, so they end with it even where it is killed. It must not be used in an event loop.

    Args:
        console: where loading is drawn.
        port: 0 takes a free one.

    Raises:
        ConfigError, ModelError: the port is taken, or an option or the checkpoint is wrong.
        EngineError: the ranks could not start.
    """
    model_dir = options.find_model()
    num_ranks, _ = options.count_ranks()
    config = options.engine_config(model_dir)
    settings = ServerSettings(model_names=(options.model or BUNDLED_NAME,))
    tokenizer, template = Tokenizer.from_dir(model_dir), ChatTemplate.from_dir(model_dir)
    listener = bind_socket(host, port)  # from here on there is something to take back
    group = EngineGroup(config, num_ranks=num_ranks, run_dir=make_run_dir())
    app = create_app(group.client, tokenizer, settings, template)
    stop = asyncio.Event()
    ready: Future[None] = Future()
    runner = asyncio.Runner()
    loop = runner.get_loop()
    serving = threading.Thread(
        target=lambda: runner.run(_serve(group, app, listener, stop, console, ready)), name="server"
    )
    serving.start()
    try:
        ready.result()
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{listener.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        serving.join()
        runner.close()


async def _serve(
    group: EngineGroup,
    app: FastAPI,
    listener: socket,
    stop: asyncio.Event,
    console: Console,
    ready: "Future[None]",
) -> None:
    http = asyncio.create_task(serve_http(app, listener, stop=stop, grace_s=0.0), name="http")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    loading = asyncio.create_task(show_loading(group.client, console), name="loading")
    try:
        await group.start()
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            ready.set_result(None)
            await stopping
    except BaseException as error:
        if ready.done():
            raise
        ready.set_exception(error)
    finally:
        stop.set()
        await http
        await group.close()
        await asyncio.gather(loading, return_exceptions=True)  # where it was not done, it now ends with an error
