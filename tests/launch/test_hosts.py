"""Three hosts: one rank each, a stream over all of them, and what becomes of it when one is killed or cut off."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from checkpoints import checkpoint, hf_greedy, random_prompts
from launch.hosts import Hosts, hosts

CAN_MAKE_HOSTS = os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("unshare") is not None
pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="network namespaces need root, ip and unshare"),
]

SMALL = ("--ranks", "1", "--device", "cpu", "--page-tokens", "16", "--kv-memory", "8MiB")
STEP_TIMEOUT_S = 5
PORT = 8000
TOKENS = 600


class Cluster:
    """`leanserve serve` on three hosts."""

    def __init__(self, net: Hosts, model_dir: Path, logs: Path) -> None:
        self.net = net
        self.url = f"http://{net.address(0)}:{PORT}"
        self.logs = [logs / f"host-{host}" for host in range(net.count)]
        options = (str(model_dir), *SMALL, "--step-timeout", str(STEP_TIMEOUT_S), "--log-format", "json")
        http = ("--host", net.address(0), "--insecure", "--port", str(PORT))
        self.nodes: list[subprocess.Popen[bytes]] = [
            net.serve(host, (*options, *http), log) for host, log in enumerate(self.logs)
        ]

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=5)

    def pid_of(self, rank: int) -> int:
        return next(r["pid"] for r in self.health().json()["ranks"] if r["rank"] == rank)

    def wait(self, what: str, condition: Callable[[], bool], timeout_s: float) -> float:
        """Seconds until it holds."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            try:
                if condition():
                    return time.monotonic() - began
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        told = "\n".join(f"{log.name}:\n{log.read_text()}" for log in self.logs)
        raise AssertionError(f"not {what} within {timeout_s:g} s\n{told}")

    def is_whole(self) -> bool:
        ranks = self.health().json().get("ranks", [])
        return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200 and len(ranks) == self.net.count

    def events(self, host: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.logs[host].read_text().splitlines() if line.startswith("{")]

    def stop(self) -> list[int]:
        """Exit codes of all hosts, of which only the first is told."""
        children = [child for node in self.nodes for child in psutil.Process(node.pid).children(recursive=True)]
        self.nodes[0].send_signal(signal.SIGTERM)
        try:
            return [node.wait(30) for node in self.nodes]
        finally:
            self.kill()
            _, alive = psutil.wait_procs(children, timeout=10)
            for orphan in alive:
                orphan.kill()
            assert not alive, f"still there: {alive}"

    def kill(self) -> None:
        for node in self.nodes:
            if node.poll() is None:
                node.kill()
                node.wait()


@pytest.fixture
def cluster(tmp_path_factory, tmp_path) -> Iterator[Cluster]:
    with hosts(3) as net:
        made = Cluster(net, checkpoint(tmp_path_factory, "llama"), tmp_path)
        try:
            made.wait("ready", made.is_whole, 90)
            yield made
        finally:
            made.kill()


class Stream:
    """A request whose tokens are read by a thread of its own."""

    def __init__(self, url: str, prompt: list[int]) -> None:
        self.tokens: list[int] = []
        self.error: object = None
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True, "return_token_ids": True}
        self._thread = threading.Thread(target=self._read, args=(f"{url}/v1/completions", body))
        self._thread.start()
        while len(self.tokens) < 10:
            time.sleep(0.01)
            assert self._thread.is_alive(), self.error

    def _read(self, url: str, body: dict[str, Any]) -> None:
        with httpx.stream("POST", url, json=body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    content = json.loads(line.removeprefix("data: "))
                    if "error" in content:
                        self.error = content["error"]
                        return
                    self.tokens += content["choices"][0]["token_ids"]

    def result(self) -> list[int]:
        self._thread.join()
        assert self.error is None, self.error
        return self.tokens


def test_a_killed_rank_0_and_a_host_cut_off_are_survived(cluster: Cluster, tmp_path_factory) -> None:
    prompt = random_prompts([70], seed=8)[0]
    (expected,) = hf_greedy(checkpoint(tmp_path_factory, "llama"), [prompt], TOKENS)
    assert {r["rank"] for r in cluster.health().json()["ranks"]} == {0, 1, 2}

    stream = Stream(cluster.url, prompt)
    pid = cluster.pid_of(0)
    os.kill(pid, signal.SIGKILL)
    assert stream.result() == expected
    back_s = cluster.wait("whole again", cluster.is_whole, 60)
    print(f"rank 0 killed: the stream went on; whole {back_s:.1f} s after it ended")
    assert any(f"rank 0 (pid {pid})" in event["message"] for event in cluster.events(0))

    stream = Stream(cluster.url, prompt)
    cluster.net.cut(2)
    seen_s = cluster.wait("noticed", lambda: cluster.health().status_code == 503, STEP_TIMEOUT_S + 10)
    print(f"host 2 cut off: noticed after {seen_s:.1f} s")
    time.sleep(STEP_TIMEOUT_S)  # it stays away longer than anybody has patience for
    cluster.net.mend(2)
    whole_s = cluster.wait("whole again", cluster.is_whole, 120)
    print(f"host 2 back: whole after {whole_s:.1f} s")
    assert stream.result() == expected
    lost = [event["message"] for event in cluster.events(0) if "wait for restart" in event["message"]]
    assert "rank 2" in lost[-1] or "the step after" in lost[-1]
    assert cluster.stop() == [0, 0, 0]


def test_a_name_that_leads_a_host_to_itself_alone_is_not_told_to_others(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with hosts(2) as net:
        for host in range(2):
            code = "import sys; from leanserve.launch.own_address import address_towards; "
            code += "print(*map(address_towards, sys.argv[1:]))"
            command = [sys.executable, "-c", code, net.name(0), "127.0.0.1"]
            assert net.run(host, command, told, {}).wait(30) == 0, told.read_text()
            assert told.read_text().split() == [net.address(host), "127.0.0.1"]
