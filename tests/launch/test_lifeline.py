"""Whose process ids are whose."""

import os
import signal
import subprocess
import sys

from leanserve.launch.lifeline import is_alive, is_ours, is_stopped


def test_processes_are_told_apart() -> None:
    script = "import sys; print(flush=True); sys.stdin.read()"
    for words, ours in (([], False), (["-m", "leanserve.launch.rank"], True)):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", script, *words], **pipes) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert (is_alive(process.pid), is_ours(process.pid), is_stopped(process.pid)) == (True, ours, False)
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            assert is_stopped(process.pid)
            process.kill()
        assert (is_alive(process.pid), is_ours(process.pid), is_stopped(process.pid)) == (False, False, False)
