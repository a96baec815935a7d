"""What `leanserve serve` tells the person who started it: progress, then what was built and how to try it."""

import asyncio
import io
import json
import sys
from contextlib import suppress
from typing import TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from leanserve.contracts.messages import EngineInfo
from leanserve.launch.capacity import describe_cache, describe_context
from leanserve.server.engine_client import EngineClient

__all__ = ["describe_engine", "open_console", "print_banner", "show_loading"]


def open_console(*, quiet: bool = False) -> Console:
    """Standard error. What cannot be written there (a closed pipe, a full disk) is lost, and ends no server."""
    # None: it was closed before this process began.
    file = None if sys.stderr is None else _Lossy(sys.stderr)
    return Console(file=cast("TextIO | None", file), stderr=True, highlight=False, quiet=quiet)


class _Lossy(io.TextIOBase):
    """A text file whose failures to write are not told."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._file.encoding

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


async def show_loading(client: EngineClient, console: Console) -> EngineInfo:
    """Wait for the engine, drawing its progress.

    Raises:
        EngineError: it could not load.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    ready = asyncio.ensure_future(client.engine.wait_ready())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting ranks", total=None)
            while not (await asyncio.wait({ready}, timeout=0.1))[0]:
                if client.engine.loading is not None:
                    loading = client.engine.loading
                    progress.update(
                        task, description=f"loading {loading.stage}", completed=loading.done, total=loading.total
                    )
        return ready.result()
    finally:
        ready.cancel()


def describe_engine(info: EngineInfo) -> dict[str, str]:
    """What was built, in words, by name."""
    return {
        "ranks": f"{len(info.pages_per_rank)} x {info.device}, {info.dtype}, {info.attention} attention",
        "weights": info.weights,
        "KV cache": describe_cache(info),
        "context": describe_context(info),
    }


def print_banner(console: Console, facts: dict[str, str], url: str, example: str | list[int]) -> None:
    """Tell the facts, where the server is, and how to try it."""
    body = json.dumps(
        {"prompt": example, "max_tokens": 32} | ({} if isinstance(example, str) else {"return_token_ids": True})
    )
    lines = "\n".join(f"  {name:<10} {value}" for name, value in facts.items())
    console.print(
        f"""\
{escape(lines)}
  serving    [bold]{url}[/]

Try it:
  curl {url}/v1/completions -H 'content-type: application/json' \\
    -d '{body}'
""",
        soft_wrap=True,
    )
