"""A real `leanserve serve`, or the same under torchrun, as child processes of a test."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

READY_TIMEOUT_S = 120.0


@dataclass
class LiveServer:
    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def post(self, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def processes(self) -> list[psutil.Process]:
        """The server's process and everything it started."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


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
    port = free_port()
    command = [sys.executable, "-m", "leanserve", "serve", *arguments, "--port", str(port)]
    if torchrun_ranks is not None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--max-restarts", str(max_restarts), "--nproc-per-node", str(torchrun_ranks)]
        command = [*torchrun, *command[1:]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "200"} | (environment or {})
        )
    server = LiveServer(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_ready(server)
        yield server
    finally:
        if process.poll() is None:
            left = server.processes()
            server.stop()
            _, alive = psutil.wait_procs(left, timeout=15)
            for orphan in alive:
                orphan.kill()
            assert not alive, f"still there after SIGTERM: {alive}"


def wait_ready(server: LiveServer) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the server is not ready; it printed:\n{server.log.read_text()}")
