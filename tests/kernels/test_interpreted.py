"""The Triton kernels on a machine without a GPU: their tests again, under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so they run in processes of their own: two, side by side.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_interpreter import needs_interpreter

HERE = Path(__file__).parent
SPLIT = (
    ("test_decode.py", "test_state.py", "test_paged_kv.py", "../model/test_fused.py"),
    ("test_stream_k.py", "test_prefill.py"),
)
"""Two halves that take about as long."""


@needs_interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreted run already")
@pytest.mark.timeout(900)
def test_the_kernels_pass_in_the_interpreter(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is used there, and some take seconds to import
    logs = [tmp_path / f"{index}.log" for index in range(len(SPLIT))]
    processes = []
    for log, names in zip(logs, SPLIT, strict=True):
        command = [sys.executable, "-m", "pytest", "-q", "-k", "triton"]
        command += ["-p", "no:cacheprovider", "-p", "pytest_timeout"]
        command += [str(HERE / name) for name in names]
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(command, cwd=HERE.parents[1], env=environment, stdout=output, stderr=output)
            )
    statuses = [process.wait() for process in processes]
    for status, log in zip(statuses, logs, strict=True):
        text = log.read_text()
        assert status == 0, text[-6000:]
        # A skip would mean that the interpreter was not used.
        assert " passed" in text
        assert "skipped" not in text.splitlines()[-1]
