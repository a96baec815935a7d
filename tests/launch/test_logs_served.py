"""Every failure of a real server is told in one JSON line: what failed, where, and what was done."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpoints import checkpoint
from launch.test_staying_up import WITH_FAULTS
from live_server import LiveServer, Stream, live_server

SMALL = ("--device", "cpu", "--page-tokens", "16", "--kv-memory", "8MiB", "--ranks", "2")


def events(log: Path) -> list[dict[str, Any]]:
    """All lines but the stacks of stuck ranks, which the interpreter itself writes."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def pid_of_rank(server: LiveServer, rank: int) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ranks = {r["rank"]: r["pid"] for r in httpx.get(f"{server.url}/health").json().get("ranks", [])}
        if len(ranks) == 2:
            return ranks[rank]
        time.sleep(0.1)
    raise AssertionError("the ranks say nothing of themselves")


@pytest.mark.slow
def test_a_killed_rank_and_a_stopped_one_are_told(tmp_path_factory, tmp_path) -> None:
    model_dir = checkpoint(tmp_path_factory, "llama")
    log = tmp_path / "log"
    options = ("--step-timeout", "2", "--log-format", "json")
    body = {"prompt": [41, 42, 43, 44], "max_tokens": 400, "ignore_eos": True}
    held = tmp_path / "held"
    environment = WITH_FAULTS | {"FAULT_HELD": str(held)}
    pids: list[int] = []
    with live_server(str(model_dir), *SMALL, *options, log=log, environment=environment) as server:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            pids.append(pid_of_rank(server, 1))
            request = Stream(server, body)
            held.touch()
            os.kill(pids[-1], number)
            held.unlink()
            tokens, reasons = request.result()
            assert (len(tokens), reasons) == (400, ["length"])
    told = events(log)
    assert all({"time", "level", "event", "message"} <= set(event) for event in told)
    assert {"ready", "draining"} <= {event["event"] for event in told}
    for attempt, pid in enumerate(pids, 1):
        (lost,) = [event for event in told if f"wait for restart {attempt} of 5" in event["message"]]
        assert lost["level"] == "error"
        assert f"rank 1 (pid {pid})" in lost["message"]
        assert "1 live requests wait" in lost["message"]
    assert any(event["event"] == "rank_ended" and event["pid"] == pids[0] for event in told)
    (stuck,) = [event for event in told if event["event"] == "rank_stuck"]
    assert (stuck["rank"], stuck["stopped_ranks"]) == (0, [1])
    assert "41, 42, 43" not in log.read_text()
