"""`.ci/gpu.py`: parts are ended in time, failures show, and what was measured stands in the summary."""

import importlib.util
import json
import os
import select
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "gpu.py"


@pytest.fixture
def session(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_session", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_part_that_takes_too_long_is_ended_with_its_children(session, tmp_path):
    """All of them hold the writing end of a pipe: when it hangs up, they are gone."""
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    ours = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    slow = ["bash", "-c", f"exec 9>{fifo}; sleep 600 & echo here >&9; wait"]
    outcome = session.run(session.Stage("slow", slow, 1.0), 1.0)
    os.close(os.open(fifo, os.O_WRONLY))  # so that there was a writer, had they not come so far
    gone = select.poll()
    gone.register(ours, 0)
    assert gone.poll(30_000) == [(ours, select.POLLHUP)]
    os.close(ours)
    assert outcome.exit_code is None
    assert not outcome.failed
    assert "its time was over" in session.summary([outcome], tmp_path)


def test_tests_that_are_cut_short_say_which_failed(session, tmp_path, monkeypatch, capsys):
    """pytest answers the interrupt with what it found. The fifo tells that it has come so far."""
    fifo = tmp_path / "slow"
    os.mkfifo(fifo)
    tests = tmp_path / "test_cut.py"
    tests.write_text(f"""
def test_bad():
    assert 1 == 2, "this is why"

def test_slow():
    open({str(fifo)!r}, "w").close()
    __import__("time").sleep(600)
""")
    command = next(stage.command for stage in session.stages(tmp_path, tiny=True) if stage.name == "tests")
    at_mark = command.index("-m", 3)
    alone = [*command[:at_mark], "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tests)]

    class Until(session.subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 600.0:
                os.close(os.open(fifo, os.O_RDONLY))  # when test_slow has begun
                timeout = 0.0
            return super().wait(timeout)

    monkeypatch.setattr(session.subprocess, "Popen", Until)
    outcome = session.run(session.Stage("tests", alone, 1.0), 600.0)
    assert outcome.exit_code is None
    assert "FAILED: test_cut::test_bad" in session.summary([outcome], tmp_path)
    monkeypatch.setattr(session, "stages", lambda out, tiny: [])
    assert session.main(["--out", str(tmp_path)]) == 1, "an interrupted part has not passed"


def test_packages_that_the_caller_put_on_the_path_stay_there(session, tmp_path, monkeypatch):
    (tmp_path / "carried.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    importing = [sys.executable, "-c", "import carried, leanserve, lean_attention"]
    assert session.run(session.Stage("imports", importing, 1.0), 60.0).exit_code == 0


def test_a_part_that_fails_fails_the_command(session, tmp_path, monkeypatch, capsys):
    said = tmp_path / "budget"
    good = [sys.executable, "-c", f"import sys; open({str(said)!r}, 'w').write(sys.argv[1])", "{budget}"]
    parts = [session.Stage("good", good, 0.5), session.Stage("bad", ["false"], 1.0)]
    monkeypatch.setattr(session, "stages", lambda out, tiny: parts)
    assert session.main(["--out", str(tmp_path / "out"), "--budget-s", "240"]) == 1
    printed = capsys.readouterr().out
    assert "good" in printed
    assert "FAILED, exit code 1" in printed
    assert float(said.read_text()) == 75, "half of the time, less what a benchmark gets to end by itself"


def test_the_summary_holds_what_was_measured(session, tmp_path):
    row = {"case": "1 x 1k", "dtype": "bfloat16", "contender": "lean", "us": 12.34, "share_of_read": 0.5}
    wrong = {"case": "1 x 4k", "dtype": "bfloat16", "contender": "peer", "wrong": "max error 3"}
    (tmp_path / "kernels").mkdir()
    kernels = {"about": {"device": "some GPU", "read_gbps": 7.0}, "rows": [row, wrong]}
    (tmp_path / "kernels" / "result.json").write_text(json.dumps(kernels))
    text = session.summary([], tmp_path)
    assert "us: lean 12.3  lean reads at 50%" in text
    assert "WRONG: peer on 1 x 4k" in text
    assert "engine" not in text, "it left nothing"


@pytest.mark.slow
def test_a_little_of_everything_runs_on_a_cpu(session, tmp_path, capfd):
    assert session.main(["--tiny", "--out", str(tmp_path), "--budget-s", "900"]) == 0
    printed = capfd.readouterr().out
    for line in ("tests", "kernels", "engine"):
        assert f"{line:<10}" in printed
    assert "3 x 64" in printed
    assert printed.rstrip().endswith((tmp_path / "summary.txt").read_text().rstrip())
