"""What a rank of a user's own torchrun does when it is told to end."""

import signal
import subprocess
import sys

import pytest

RANK = """
import time
from leanserve.launch.termination import Termination
termination, is_whole = Termination(), [True]
def drain():
    print("drains", flush=True)
    is_whole[0] = False
termination.may_drain(lambda: is_whole[0], drain)
print("serves", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_rank_that_is_told_to_end_drains_first(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "serves\n"
        rank.send_signal(number)
        assert rank.stdout.readline() == "drains\n"
        assert rank.wait(60) == 128 + signal.SIGTERM
