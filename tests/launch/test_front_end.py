"""What `leanserve serve` does between its options and its server."""

import asyncio
import contextlib
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from leanserve.contracts.errors import ConfigError
from leanserve.launch import front_end
from leanserve.launch.banner import open_console, print_banner, show_loading
from leanserve.launch.front_end import ServeOptions, serve_until_stopped
from leanserve.launch.options import LaunchOptions
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


def closed_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has a device that is always full")
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("broken", [closed_pipe, full_disk])
def test_a_banner_that_cannot_be_written_ends_nobody(
    broken: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = os.fdopen(broken(), "w", buffering=1)
    with pytest.raises(OSError, match=r"pipe|space"):
        file.write("so it is broken\n")
    for standard_error in (file, None):  # None: it was closed before the process began
        monkeypatch.setattr(sys, "stderr", standard_error)
        print_banner(open_console(), {"ranks": "1"}, "http://127.0.0.1:8000", "The cat")
    with contextlib.suppress(OSError):  # what it still holds is lost
        file.close()


def test_a_group_that_cannot_be_made_leaves_no_run_directory(monkeypatch) -> None:
    made: list[Path] = []

    def refuse(config: object, *, run_dir: Path, **_: object) -> None:
        assert run_dir.is_dir()
        made.append(run_dir)
        raise ConfigError("no address leads there")

    monkeypatch.setattr(front_end, "EngineGroup", refuse)
    monkeypatch.setattr(front_end, "open_log", lambda level, log_format: None)  # it would be every later test's
    with pytest.raises(ConfigError, match="no address leads there"):
        serve_until_stopped(ServeOptions(launch=LaunchOptions(device="cpu"), port=0, log_format="json"))
    [run_dir] = made
    assert not run_dir.exists()
