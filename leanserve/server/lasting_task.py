"""Tasks that last as long as the front end does. By itself an exception would end one in silence, and leave a server
that looks well: nobody hears the engine any more, or nobody ends ranks that are stuck."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from leanserve.server.logs import log_internal_error

__all__ = ["start_lasting"]


def start_lasting(work: Coroutine[Any, Any, None], name: str, on_broken: Callable[[str], None]) -> "asyncio.Task[None]":
    """Start a task that nobody awaits before it is cancelled.

    Should it raise, the log has where from, and `on_broken` is told what broke: of an exception the type alone, since
    its message may quote a prompt, but of the operating system's errors everything.
    """
    task = asyncio.create_task(work, name=name)

    def ended(task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log_internal_error(error)
            why = f" ({error})" if isinstance(error, OSError) else ""
            on_broken(f"the front end's task {name!r} broke: {type(error).__name__}{why}")

    task.add_done_callback(ended)
    return task
