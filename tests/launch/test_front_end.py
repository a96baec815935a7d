"""What `leanserve serve` does between its options and its server."""

import asyncio
import gc
from typing import Any

from rich.console import Console

from leanserve.launch.front_end import show_loading
from server.front_end import connected, run


def test_a_start_that_is_given_up_leaves_no_error_behind() -> None:
    met: list[dict[str, Any]] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: met.append(context))
        async with connected(ready=False) as (client, _):
            loading = asyncio.create_task(show_loading(client, Console(quiet=True)))
            for _ in range(3):  # it waits for the engine
                await asyncio.sleep(0)
            loading.cancel()
            await asyncio.wait({loading})
            client.engine.fail("given up")
            await asyncio.sleep(0)
            gc.collect()

    run(scenario())
    assert not met
