"""The soft limit of open files, in processes of their own, and on a macOS that is told of."""

import logging
import resource
import subprocess
import sys

import pytest

from leanserve.launch import open_files

HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
RAISE = """
import resource, sys
from leanserve.launch.open_files import allowed_open_files, raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, tuple(map(int, sys.argv[1:])))
allowed = allowed_open_files()
raise_open_files()
print(allowed, *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "raised"), [(256, 3000, 3000), (256, 256, 256), (300, HARD, None)])
def test_the_soft_limit_goes_up_to_the_hard_one(soft: int, hard: int, raised: int | None) -> None:
    if raised is None:
        raised = open_files.WANTED if HARD == resource.RLIM_INFINITY else min(HARD, open_files.WANTED)
    command = [sys.executable, "-c", RAISE, str(soft), str(hard)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in said.split()] == [raised, raised, hard]


@pytest.mark.parametrize(
    ("limits", "kernel_max", "asked", "allowed"),
    [
        ((256, resource.RLIM_INFINITY), 1 << 40, [65536], 65536),
        ((256, resource.RLIM_INFINITY), 10240, [65536, 10240], 65536),
        ((256, 1 << 30), 1, [65536, 10240], 65536),
        ((100_000, 1 << 30), 1 << 40, [], 100_000),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1 << 40, [], 65536),
    ],
)
def test_no_more_is_asked_for_than_is_granted(monkeypatch, caplog, limits, kernel_max, asked, allowed) -> None:
    tried: list[int] = []

    def setrlimit(number: int, wanted: tuple[int, int]) -> None:
        assert (number, wanted[1]) == (resource.RLIMIT_NOFILE, limits[1])
        tried.append(wanted[0])
        if wanted[0] > kernel_max:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda number: limits)
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    with caplog.at_level(logging.DEBUG, "leanserve.launch"):
        assert open_files.allowed_open_files() == allowed
        open_files.raise_open_files()
    assert tried == asked
    assert len(caplog.records) == len(asked)
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
