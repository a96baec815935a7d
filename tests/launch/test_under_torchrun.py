"""A user's own torchrun: it starts failed ranks again, and its SIGTERM is a drain."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpoints import checkpoint, hf_greedy, random_prompts
from live_server import LiveServer, Stream, live_server

pytestmark = pytest.mark.slow

SMALL = ("--device", "cpu", "--page-tokens", "16", "--kv-memory", "8MiB", "--step-timeout", "5")
TOKENS = 400


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory, "llama")


def ranks_of(server: LiveServer) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ranks = httpx.get(f"{server.url}/health").json().get("ranks", [])
        if len(ranks) == 2:
            return ranks
        time.sleep(0.1)
    raise AssertionError("the ranks say nothing of themselves")


def test_ranks_are_started_again_and_sigterm_drains(model_dir, tmp_path) -> None:
    prompt = random_prompts([50], seed=4)[0]
    (expected,) = hf_greedy(model_dir, [prompt], TOKENS)
    log = tmp_path / "log"
    with live_server(str(model_dir), *SMALL, log=log, torchrun_ranks=2, max_restarts=5) as server:
        for rank in (1, 0):
            stream = Stream(server, {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True})
            os.kill(ranks_of(server)[rank]["pid"], signal.SIGKILL)
            assert stream.result() == (expected, ["length"])
        ranks_of(server)
        processes = server.processes()
        stream = Stream(server, {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True})
        server.process.send_signal(signal.SIGTERM)
        assert stream.result() == (expected, ["length"])
        server.process.wait(40)
        deadline = time.monotonic() + 10
        while any(p.is_running() and p.status() != "zombie" for p in processes):
            assert time.monotonic() < deadline, [p for p in processes if p.is_running()]
            time.sleep(0.1)
    told = log.read_text()
    assert told.count("wait for restart") == 2
    assert "the server drains" in told
