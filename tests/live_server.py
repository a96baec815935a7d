"""A real `leanserve serve`, or the same under torchrun, as child processes of a test."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from warm_start import warm_start_method

READY_TIMEOUT_S = 240.0
PATIENCE_S = 120.0
"""For what takes seconds on an idle machine."""


@dataclass
class LiveServer:
    process: "subprocess.Popen[bytes]"
    log: Path
    url: str = ""
    """On a port that the server chose; known when it is ready."""

    def post(self, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120, verify=False)

    def processes(self) -> list[psutil.Process]:
        """The server's process and everything it started."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = PATIENCE_S) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


class Stream:
    """One request, read by a thread of its own. It is there when ten tokens are."""

    def __init__(self, server: LiveServer, body: dict[str, object]) -> None:
        self.tokens: list[int] = []
        self.reasons: list[str] = []
        self._url = f"{server.url}/v1/completions"
        self._body = body | {"stream": True, "return_token_ids": True}
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._begun.wait(PATIENCE_S)

    def result(self) -> tuple[list[int], list[str]]:
        """All its tokens, and its finish reasons."""
        self._thread.join()
        return self.tokens, self.reasons

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=PATIENCE_S) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    self.tokens += choice["token_ids"]
                    self.reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
                    if len(self.tokens) >= 10:
                        self._begun.set()


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def live_server(
    *arguments: str,
    log: Path,
    torchrun_ranks: int | None = None,
    max_restarts: int = 0,
    environment: dict[str, str] | None = None,
) -> Iterator[LiveServer]:
    """Start a server, wait until it is ready, and end it.

    Args:
        torchrun_ranks: start it as a user's own torchrun would, with `max_restarts` for torchrun.
        environment: variables to add.
    """
    command = [sys.executable, "-m", "leanserve", "serve", *arguments, "--port", "0"]
    if torchrun_ranks is not None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--max-restarts", str(max_restarts), "--nproc-per-node", str(torchrun_ranks)]
        command = [*torchrun, *command[1:]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "200"} | (environment or {})
        )
    server = LiveServer(process, log)
    try:
        wait_ready(server)
        yield server
    finally:
        if process.poll() is None:
            left = server.processes()
            server.stop()
            _, alive = psutil.wait_procs(left, timeout=PATIENCE_S)
            for orphan in alive:
                orphan.kill()
            assert not alive, f"still there after SIGTERM: {alive}"


def wait_ready(server: LiveServer) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        told = re.search(r"(?:curl |ready at )(http://127\.0\.0\.1:\d+)(?=\D)", server.log.read_text(errors="replace"))
        if told is not None:
            server.url = told[1]
            assert httpx.get(f"{server.url}/ready", timeout=PATIENCE_S).status_code == 200
            return
        time.sleep(0.1)
    raise AssertionError(f"the server is not ready; it printed:\n{server.log.read_text()}")


def refusal(*arguments: str, log: Path) -> str:
    """What a server that cannot start prints. Its process begins with everything imported."""
    process = multiprocessing.get_context(warm_start_method()).Process(target=_serve, args=(arguments, log))
    process.start()
    process.join(READY_TIMEOUT_S)
    assert process.exitcode in (1, 2), f"exit code {process.exitcode}; it printed:\n{log.read_text()}"
    return log.read_text()


def _serve(arguments: tuple[str, ...], log: Path) -> None:
    from leanserve.__main__ import main

    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["COLUMNS"] = "200"
    sys.argv = ["leanserve", "serve", *arguments, "--port", "0"]
    main()
