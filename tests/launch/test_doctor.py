"""`leanserve doctor` as a user runs it, and what it says of hosts that lack something."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from leanserve.launch.host_facts import HostFacts, judge_host

HOST = HostFacts(
    memory=64 << 30,
    available=60 << 30,
    cgroup_limit=None,
    shm_size=32 << 30,
    shm_free=32 << 30,
    open_files=65536,
    processes=None,
    locked_memory=None,
    temporary_dir=Path("/tmp"),
    c_compiler="/usr/bin/gcc",
    python_header=Path("/usr/include/python3.11/Python.h"),
)


def doctor(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "leanserve", "doctor", "--device", "cpu", *arguments]
    environment = os.environ | {"LEANSERVE_API_KEYS": "not-to-be-told"} | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_three_ranks_meet_and_a_taken_port_is_noted() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = doctor("--ranks", "3", "--port", str(port))
    assert found.returncode == 0, found.stdout + found.stderr
    for section in ("Versions", "torch and GPUs", "Host", "Ports", "Trial: 3 ranks"):
        assert f"\n{section}\n" in found.stdout
    assert f"Note: port {port} on 127.0.0.1 is taken" in found.stdout
    gathers = [line.split() for line in found.stdout.splitlines() if " KiB " in line]
    assert [line[0] for line in gathers] == ["1", "16", "256", "4,096"]
    for _, _, median, _, worst, _ in gathers:
        assert 0 < int(median.replace(",", "")) <= int(worst.replace(",", ""))
    assert "A server can work here." in found.stdout
    assert "not-to-be-told" not in found.stdout


def test_ranks_that_cannot_talk_are_an_error() -> None:
    found = doctor("--port", "0", GLOO_SOCKET_IFNAME="none-such")
    assert found.returncode == 1
    assert "WRONG: 2 ranks cannot work together: rank " in found.stdout
    assert "none-such" in found.stdout
    assert "A server can work here" not in found.stdout


def test_options_that_contradict_each_other_are_an_error() -> None:
    found = doctor("--port", "0", "--comm", "nccl")
    assert found.returncode == 1
    assert "WRONG: comm nccl needs GPUs" in found.stdout


@pytest.mark.parametrize(
    ("lack", "gpus", "errors", "warnings"),
    [
        ({}, 8, 0, 0),
        ({"shm_free": 60 << 20}, 1, 0, 0),
        ({"shm_free": 60 << 20}, 2, 1, 0),
        ({"temporary_dir": Path("/" + "long" * 25)}, 0, 0, 1),
        ({"c_compiler": None}, 0, 0, 0),
        ({"c_compiler": None, "python_header": None}, 1, 2, 0),
        ({"open_files": 1024}, 0, 0, 1),
        ({"available": 1 << 30}, 0, 0, 1),
    ],
)
def test_what_a_host_lacks_is_named(lack, gpus, errors, warnings) -> None:
    found = judge_host(replace(HOST, **lack), gpus=gpus)
    assert (len(found[0]), len(found[1])) == (errors, warnings)
