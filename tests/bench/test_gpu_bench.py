"""`bench gpu`: on the CPU as far as it goes there, and whole where there is a GPU."""

import io
import json

import pytest
from rich.console import Console

from leanserve.bench.gpu import TINY_CELLS, run_gpu_bench
from leanserve.bench.gpu_report import GpuReport, print_gpu_report, write_gpu_report
from leanserve.bench.task import MIN_STEPS
from leanserve.contracts.errors import ConfigError
from leanserve.worker.device import Gpus


def test_it_measures_what_it_says_and_writes_what_it_prints(tmp_path, monkeypatch):
    monkeypatch.setattr("leanserve.bench.gpu.usable_gpus", lambda: Gpus(0, "none for this test"))
    saved: list[GpuReport] = []
    report = run_gpu_bench((), Console(file=io.StringIO()), tiny=True, save=saved.append)
    assert [[set(cell.figures) for cell in each.cells] for each in saved] == [[{"eager"}] * len(TINY_CELLS)] * 2
    write_gpu_report(report, tmp_path)
    written = json.loads((tmp_path / "gpu.json").read_bytes())
    assert [(cell["context_tokens"], cell["batch"]) for cell in written["cells"]] == list(TINY_CELLS)
    for cell in written["cells"]:
        assert set(cell["figures"]) == {"eager"}, "there are no graphs on the CPU"
        seen = cell["figures"]["eager"]
        assert seen["steps"] >= MIN_STEPS
        assert seen["tokens_per_s"] == pytest.approx(1e3 * cell["batch"] / seen["step_ms"], rel=0.01)
        assert 0 < seen["forward_ms"] + seen["sample_ms"] + seen["schedule_ms"] < 1.5 * seen["step_ms"]
        assert cell["read_ms"] == pytest.approx(1e3 * cell["read_bytes"] / written["read_bytes_per_s"], rel=0.01)
    one, three = written["cells"]
    # KV of 64 tokens (2 layers, K and V, 2 heads of 16, float32) and a row of the embedding for each of two more.
    assert three["read_bytes"] - one["read_bytes"] == 2 * (64 * 2 * 2 * 2 * 16 + 64) * 4
    assert written["checks"] == []
    assert written["left_out"] == []
    printed = io.StringIO()
    print_gpu_report(report, Console(file=printed, width=80))
    for cell in report.cells:
        assert f"{cell.figures['eager'].step_ms:.2f}" in printed.getvalue()


def test_what_has_no_time_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr("leanserve.bench.gpu.usable_gpus", lambda: Gpus(0, "none for this test"))
    report = run_gpu_bench((1, 2), Console(file=io.StringIO()), tiny=True, budget_s=0)
    assert report.left_out == ["decode, eager", "tokens on 1 rank eager", "tokens on 2 ranks eager"]
    assert [cell.figures for cell in report.cells] == [{}, {}]
    assert report.checks == []
    printed = io.StringIO()
    print_gpu_report(report, Console(file=printed, width=200))
    assert "No time was left for: decode, eager; tokens on 1 rank eager" in printed.getvalue()


def test_without_a_gpu_only_the_tiny_model_is_served(monkeypatch):
    monkeypatch.setattr("leanserve.bench.gpu.usable_gpus", lambda: Gpus(0, "the driver is too old"))
    with pytest.raises(ConfigError, match=r"needs a GPU: the driver is too old; --tiny"):
        run_gpu_bench((1,), Console(file=io.StringIO()), tiny=False)


@pytest.mark.gpu
def test_every_check_passes_on_a_gpu():
    report = run_gpu_bench((1, 2), Console(file=io.StringIO()), tiny=True)
    assert [check.passed for check in report.checks] == [True] * (2 * len(TINY_CELLS) + 1)
    assert all(set(cell.figures) == {"graphs", "unfused", "eager"} for cell in report.cells)
