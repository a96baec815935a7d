"""The Triton kernels on a machine without a GPU: this directory's tests again, under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so they run in processes of their own: two, side by side.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SPLIT = (
    ("test_decode.py",),
    ("test_stream_k.py", "test_prefill.py", "test_state.py", "test_paged_kv.py"),
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreted run already")
@pytest.mark.timeout(900)
def test_the_kernels_pass_in_the_interpreter(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    runs = []
    for index, names in enumerate(SPLIT):
        log = (tmp_path / f"{index}.log").open("w+")
        command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider"]
        command += [str(HERE / name) for name in names]
        runs.append((subprocess.Popen(command, cwd=HERE.parents[1], env=environment, stdout=log, stderr=log), log))
    for process, log in runs:
        status = process.wait()
        log.seek(0)
        text = log.read()
        assert status == 0, text[-6000:]
        # A skip would mean that the interpreter was not used.
        assert " passed" in text
        assert "skipped" not in text.splitlines()[-1]
