"""Ranks die, hang and diverge under a real server: streams go on, and each failure is named."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from checkpoints import NEAR_TIE, VOCAB_SIZE, checkpoint, hf_greedy, hf_logits, random_prompts
from launch.chaos import Chaos, ask, leftovers, questions
from leanserve.contracts.sampling import SamplingParams
from leanserve.worker.sampler import Draw, sample
from live_server import PATIENCE_S, LiveServer, Stream, live_server

SMALL = ("--device", "cpu", "--page-tokens", "16", "--kv-memory", "8MiB")
FAULTS = str(Path(__file__).with_name("faults"))
WITH_FAULTS = {"PYTHONPATH": os.pathsep.join([FAULTS, os.environ.get("PYTHONPATH", "")])}
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


def assert_clear(model_dir: Path, body: dict[str, Any], answer: list[int]) -> None:
    """It is the answer of transformers' logits, and no rounding of them could give another."""
    logits_SV = hf_logits(model_dir, body["prompt"] + answer)[len(body["prompt"]) - 1 : -1]
    options = {key: body[key] for key in ("temperature", "top_p") if key in body}
    draws = [Draw(SamplingParams(**options), body.get("seed", 0), index) for index in range(len(answer))]
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        rounding_SV = NEAR_TIE / 2 * (2 * torch.rand(logits_SV.shape, generator=generator) - 1)
        assert sample(logits_SV + rounding_SV, draws).tolist() == answer, "take another seed"


def run_chaos(model_dir: Path, log: Path, duration_s: float, attack_every_s: tuple[float, float]) -> Chaos:
    limits = ("--step-timeout", "6", "--max-restarts", "1000")
    with live_server(str(model_dir), "--ranks", "3", *SMALL, *limits, log=log) as server:
        bodies = questions(40, VOCAB_SIZE, seed=5)
        answers = answer_all(server, bodies)
        for body, answer in zip(bodies, answers, strict=True):
            assert_clear(model_dir, body, answer)
        chaos = Chaos(server, bodies, answers, attack_every_s=attack_every_s)
        run_dir = run_dir_of(server)
        tally = asyncio.run(chaos.run(duration_s))
        print(tally)
        processes = server.processes()
        assert server.stop() == 0
        assert leftovers(processes, run_dir) == []
    assert tally.wrong == []
    restarts = log.read_text().count("wait for restart")  # attacks, and what a busy machine took for one
    assert tally.blamed < restarts, "one failure can be laid to one request, and the first one to none"
    assert tally.finished > 0
    assert tally.resumed_streams > 0
    return chaos


@pytest.mark.slow
def test_one_minute_of_chaos(model_dir, tmp_path):
    """CI runs it, after the tests that everybody runs."""
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
    environment = WITH_FAULTS | {"FAULT_DEADLY_TOKEN": str(DEADLY), "FAULT_DIVERGE": str(diverge)}
    prompt = random_prompts([30], seed=3)[0]
    expected = hf_greedy(model_dir, [prompt], 120)[0]
    body = {"prompt": prompt, "max_tokens": 120, "temperature": 0, "return_token_ids": True}
    with live_server(str(model_dir), "--ranks", "2", *SMALL, log=tmp_path / "log", environment=environment) as server:
        good = Stream(server, body)
        bad = server.post(prompt=[DEADLY] * 5, max_tokens=3)
        assert (bad.status_code, bad.headers["x-should-retry"]) == (500, "false")
        assert "died twice while it worked on this request" in bad.json()["error"]["message"]
        assert good.result() == (expected, ["length"])

        diverge.write_text("1")
        assert server.post(**body).json()["choices"][0]["token_ids"] == expected
    log = (tmp_path / "log").read_text()
    assert "rank 1 has checksum" in log
    lines = log.splitlines()
    assert any("the ranks have drifted apart" in line for line in lines)
    assert sum("wait for restart" in line for line in lines) == 4, "the deadly request thrice, and the desync"
    assert any("alone on probation when the engine died: it is failed, and not tried again" in line for line in lines)


def test_sigterm_lets_streams_finish_and_a_second_signal_does_not_wait(model_dir, tmp_path):
    """SIGHUP, of a terminal that is closed, is as good as SIGTERM. The engine is held until the server drains."""
    held = tmp_path / "held"
    environment = WITH_FAULTS | {"FAULT_HELD": str(held)}
    options = (str(model_dir), "--ranks", "1", *SMALL)
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    for signals in ([signal.SIGTERM], [signal.SIGTERM if under_nohup else signal.SIGHUP, signal.SIGTERM]):
        with live_server(*options, log=tmp_path / "log", environment=environment) as server:
            processes, run_dir = server.processes(), run_dir_of(server)
            lines: list[str] = []
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    if len(lines) == 10:
                        held.touch()
                        server.process.send_signal(signals[0])
                        wait_until_draining(server)
                        if len(signals) == 2:
                            server.process.send_signal(signals[1])
                        else:
                            held.unlink()
            held.unlink(missing_ok=True)
            ends = [line for line in lines if line.startswith("data: ")]
            assert ends[-1] == "data: [DONE]"
            last = json.loads(ends[-2].removeprefix("data: "))
            if len(signals) == 1:
                assert last["choices"][0]["finish_reason"] == "length"
            else:
                assert "shutting down" in last["error"]["message"]
            assert server.process.wait(PATIENCE_S) == 0
            assert leftovers(processes, run_dir) == []


@pytest.mark.slow
def test_a_stopped_rank_does_not_outlive_its_server(model_dir, tmp_path):
    with live_server(str(model_dir), "--ranks", "2", *SMALL, log=tmp_path / "log") as server:
        processes, run_dir = server.processes(), run_dir_of(server)
        stopped = [p for p in processes if "leanserve.launch.rank" in p.cmdline()][1]
        deadline = time.monotonic() + PATIENCE_S
        while len(httpx.get(f"{server.url}/health", timeout=PATIENCE_S).json()["ranks"]) < 2:  # known by their pulses
            assert time.monotonic() < deadline
        stopped.suspend()
        assert server.stop() == 0
        assert leftovers(processes, run_dir) == []


def wait_until_draining(server: LiveServer) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while httpx.get(f"{server.url}/ready", timeout=PATIENCE_S).status_code != 503:
        assert time.monotonic() < deadline, "new work is still accepted"
    refused = server.post(prompt=[5], max_tokens=1)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
