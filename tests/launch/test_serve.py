"""The server as a user starts, uses and stops it: real processes, real sockets."""

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from checkpoints import checkpoint, hf_greedy, random_prompts
from live_server import PATIENCE_S, live_server, refusal

GREEDY = {"temperature": 0, "max_tokens": 8, "return_token_ids": True}
SMALL = ("--device", "cpu", "--page-tokens", "16", "--kv-memory", "8MiB")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts([1, 17, 90, 300], seed=11)


@pytest.fixture(scope="module")
def expected(model_dir, prompts) -> list[list[int]]:
    return hf_greedy(model_dir, prompts, 8)


def answers_of(server, prompts) -> list[list[int]]:
    return [server.post(prompt=ids, **GREEDY).json()["choices"][0]["token_ids"] for ids in prompts]


def leanserve(*arguments: str, **options) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "leanserve", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE_S,
        env=os.environ | {"COLUMNS": "200"},
        **options,
    )


def test_two_ranks_serve_many_streams_and_leave_nothing(model_dir, prompts, expected, tmp_path):
    temporary = Path(tempfile.mkdtemp(prefix="ls-", dir="/tmp"))  # a short path, for sockets
    options = ("--ranks", "2", *SMALL)
    with live_server(str(model_dir), *options, log=tmp_path / "log", environment={"TMPDIR": str(temporary)}) as server:
        assert answers_of(server, prompts) == expected
        assert "torch" not in _modules_of(server.process.pid)

        bodies = [
            {"prompt": ids, "temperature": 0, "max_tokens": 5 + i % 7, "stream": True, "return_token_ids": True}
            for i, ids in enumerate(random_prompts([1 + 13 * (i % 9) for i in range(64)], seed=12))
        ]
        with ThreadPoolExecutor(64) as pool:
            streams = list(pool.map(lambda body: _stream(server.url, body), bodies))
        assert [len(tokens) for tokens in streams] == [body["max_tokens"] for body in bodies]

        processes = server.processes()
        assert len(processes) >= 4  # front end, agent, two ranks
        ranks = [process.environ() for process in processes if "leanserve.launch.rank" in process.cmdline()]
        assert ["GOMP_SPINCOUNT" in environment for environment in ranks] == [True, True]
        run_dir = Path(processes[-1].environ()["LEANSERVE_RUN_DIR"])
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert server.stop(signal.SIGINT) == 0
        _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
        assert not alive
    assert run_dir.parent == temporary
    temporary.rmdir()  # it is empty
    log = (tmp_path / "log").read_text()
    assert "2 x CPU" in log
    assert "curl http://127.0.0.1" in log
    assert "Traceback" not in log


def test_a_killed_front_end_takes_its_ranks_along(model_dir, tmp_path):
    with live_server(str(model_dir), "--ranks", "2", *SMALL, log=tmp_path / "log") as server:
        processes = server.processes()
        run_dir = Path(processes[-1].environ()["LEANSERVE_RUN_DIR"])
        server.process.kill()
        _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
        assert not alive
    assert not run_dir.exists()


def test_a_killed_rank_ends_the_server_with_one_clear_line(model_dir, tmp_path):
    options = ("--ranks", "2", *SMALL, "--max-restarts", "0")
    with live_server(str(model_dir), *options, log=tmp_path / "log") as server:
        rank = next(p for p in server.processes() if "leanserve.launch.rank" in " ".join(p.cmdline()))
        rank.kill()
        assert server.process.wait(PATIENCE_S) == 1
    log = (tmp_path / "log").read_text()
    assert "was ended by SIGKILL" in log
    assert "Traceback" not in log


def test_a_taken_port_is_reported_before_anything_loads(model_dir):
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = leanserve("serve", str(model_dir), "--port", str(port))
        assert result.returncode == 1
        assert f"port {port}" in result.stderr
        assert "--port" in result.stderr
        assert "Traceback" not in result.stderr
        assert "LeanServe" not in result.stderr, "the first line of one that goes on"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--page-tokens", "48"), "allowed are 16, 32, 64, 128 and 256"),
        (("--ranks", "two"), "neither auto nor a whole number"),
        (("--ranks", "0"), "from 1 to 1024"),
        (("--dtype", "int3"), "'auto', 'float32', 'bfloat16', 'float16'"),
        (("--kv-memory", "lots"), "write a number of bytes"),
        (("--max-context-tokens", "1"), "at least 2"),
        (("--max-context-tokens", "9k"), "is 9216, but the model's own limit"),
        (("--max-context-tokens", "9q"), "such as 512, 16k or 1M"),
        (("--comm", "nccl", "--device", "cpu"), "needs GPUs"),
        (("--device", "cuda"), "CPU build"),
        (("--prot", "1"), "No such option"),
        (("--host", "0.0.0.0"), "add --insecure"),
        (("--host", "::"), "add --insecure"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_flag_says_what_is_allowed(model_dir, tmp_path, arguments, expected):
    """The model's own limit is looked at by the ranks; what else they refuse, test_loading asks them."""
    if arguments[-1] == "cuda":
        import torch

        if torch.version.cuda is not None:
            pytest.skip("this torch can use CUDA")
    said = refusal(str(model_dir), *arguments, log=tmp_path / "log")
    assert expected in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said


def test_a_missing_model_is_named():
    result = leanserve("serve", "/nowhere/at-all", "--port", "0")
    assert result.returncode == 1
    assert "/nowhere/at-all" in result.stderr


def test_version_and_help():
    from leanserve import __version__

    assert leanserve("--version").stdout.strip() == f"leanserve {__version__}"
    for command in ("serve", "generate", "bench"):
        assert leanserve(command, "--help").returncode == 0


def _modules_of(pid: int) -> str:
    """Shared objects that a process has mapped: torch shows, however it was imported."""
    return Path(f"/proc/{pid}/maps").read_text() if Path(f"/proc/{pid}/maps").exists() else ""


def _stream(url: str, body: dict[str, object]) -> list[int]:
    tokens: list[int] = []
    finish_reasons = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=2 * PATIENCE_S) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        import json

        choice = json.loads(line)["choices"][0]
        tokens += choice["token_ids"]
        finish_reasons.append(choice["finish_reason"])
    assert finish_reasons[-1] == "length"
    assert set(finish_reasons[:-1]) <= {None}
    return tokens
