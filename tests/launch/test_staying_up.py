"""Ranks die, hang and diverge under a real server: streams go on, and each failure is named."""

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpoints import VOCAB_SIZE, checkpoint, hf_greedy, random_prompts
from launch.chaos import Chaos, ask, leftovers, questions
from live_server import LiveServer, live_server

SMALL = ("--device", "cpu", "--page-tokens", "16", "--kv-memory", "8MiB")
FAULTS = str(Path(__file__).with_name("faults"))
DEADLY = 77


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory, "llama")


def run_dir_of(server: LiveServer) -> str:
    return next(p.environ()["LEANSERVE_RUN_DIR"] for p in server.processes() if "leanserve.launch.rank" in p.cmdline())


def answer_all(server: LiveServer, bodies: list[dict[str, Any]]) -> list[list[int]]:
    async def scenario() -> list[list[int]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            return await asyncio.gather(*(ask(http, body) for body in bodies))

    return asyncio.run(scenario())


def run_chaos(model_dir: Path, log: Path, duration_s: float, attack_every_s: tuple[float, float]) -> Chaos:
    limits = ("--step-timeout", "6", "--max-restarts", "1000")
    with live_server(str(model_dir), "--ranks", "3", *SMALL, *limits, log=log) as server:
        bodies = questions(40, VOCAB_SIZE, seed=5)
        chaos = Chaos(server, bodies, answer_all(server, bodies), attack_every_s=attack_every_s)
        run_dir = run_dir_of(server)
        tally = asyncio.run(chaos.run(duration_s))
        print(tally)
        processes = server.processes()
        assert server.stop(timeout_s=60) == 0
        assert leftovers(processes, run_dir) == []
    assert tally.wrong == []
    assert tally.blamed < len(tally.attacks), "one attack can be laid to one request, and the first one to none"
    assert tally.finished > 0
    assert tally.resumed_streams > 0
    return chaos


def test_a_short_time_of_chaos(model_dir, tmp_path):
    tally = run_chaos(model_dir, tmp_path / "log", 18.0, (3.0, 6.0)).tally
    assert tally.left > 0


@pytest.mark.slow
def test_one_minute_of_chaos(model_dir, tmp_path):
    """CI's, after the tests that everybody runs."""
    tally = run_chaos(model_dir, tmp_path / "log", 60.0, (6.0, 12.0)).tally
    assert tally.left > 0
    assert len(tally.attacks) > 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_minutes_of_chaos(model_dir, tmp_path):
    tally = run_chaos(model_dir, tmp_path / "log", 600.0, (20.0, 40.0)).tally
    assert len(tally.attacks) > 10


def test_a_deadly_request_and_a_desync_are_named_and_survived(model_dir, tmp_path):
    diverge = tmp_path / "diverge"
    environment = {
        "PYTHONPATH": os.pathsep.join([FAULTS, os.environ.get("PYTHONPATH", "")]),
        "FAULT_DEADLY_TOKEN": str(DEADLY),
        "FAULT_DIVERGE": str(diverge),
    }
    prompt = random_prompts([30], seed=3)[0]
    expected = hf_greedy(model_dir, [prompt], 120)[0]
    body = {"prompt": prompt, "max_tokens": 120, "temperature": 0, "return_token_ids": True}
    with live_server(str(model_dir), "--ranks", "2", *SMALL, log=tmp_path / "log", environment=environment) as server:
        answers: list[Any] = []
        good = threading.Thread(target=lambda: answers.append(server.post(**body).json()))
        good.start()
        bad = server.post(prompt=[DEADLY] * 5, max_tokens=3)
        assert bad.status_code == 503
        assert "died twice while it worked on this request" in bad.json()["error"]["message"]
        good.join()
        assert answers[0]["choices"][0]["token_ids"] == expected

        diverge.write_text("1")
        assert server.post(**body).json()["choices"][0]["token_ids"] == expected
    log = (tmp_path / "log").read_text()
    assert "rank 1 has checksum" in log
    lines = log.splitlines()
    assert any("the ranks have drifted apart" in line and "wait for restart" in line for line in lines)
    assert any("alone on probation when the engine died: it is failed, and not tried again" in line for line in lines)


def test_sigterm_lets_streams_finish_and_a_second_one_does_not_wait(model_dir, tmp_path):
    options = (str(model_dir), "--ranks", "1", *SMALL)
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
    for signals in (1, 2):
        with live_server(*options, log=tmp_path / "log") as server:
            processes, run_dir = server.processes(), run_dir_of(server)
            lines: list[str] = []
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    if len(lines) == 10:
                        server.process.send_signal(signal.SIGTERM)
                        wait_until_draining(server)
                        if signals == 2:
                            server.process.send_signal(signal.SIGTERM)
            ends = [line for line in lines if line.startswith("data: ")]
            assert ends[-1] == "data: [DONE]"
            last = json.loads(ends[-2].removeprefix("data: "))
            if signals == 1:
                assert last["choices"][0]["finish_reason"] == "length"
            else:
                assert "shutting down" in last["error"]["message"]
            assert server.process.wait(20) == 0
            assert leftovers(processes, run_dir) == []


def wait_until_draining(server: LiveServer) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        refused = server.post(prompt=[5], max_tokens=1)
        if refused.status_code == 503:
            assert "retry-after" in refused.headers
            assert httpx.get(f"{server.url}/ready").status_code == 503
            return
    raise AssertionError("new work is still accepted")
