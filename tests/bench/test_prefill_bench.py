"""`bench prefill` and `bench multigpu` end to end on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from leanserve.bench.commands import bench_app
from leanserve.bench.prefill_report import Measured
from leanserve.contracts.errors import ConfigError
from leanserve.worker.device import usable_gpus


def bench(folder: Path, *arguments: str) -> tuple[str, dict]:
    """What the command prints and the JSON it writes."""
    command = [sys.executable, "-m", "leanserve", "bench", *arguments, "--tiny", "--out", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads((folder / f"{arguments[0]}.json").read_bytes())


@pytest.mark.slow
def test_bench_prefill_writes_what_it_promises(tmp_path):
    printed, report = bench(tmp_path, "prefill", "--ranks", "1")
    assert "first token within" in printed
    assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")
    waits = report["waits"]
    assert waits["first_token_s"]
    assert 0 < waits["first_token_chunks"] <= 2.05
    assert 0 < waits["longest_gap_chunks"] <= 1.05
    assert waits["longest_chunk_s"] >= waits["chunk_s"] > 0
    assert report["host_cost"]["step_ms"].keys() == {"1024", "2048"}
    quantities = [measured["quantity"] for measured in report["measured"]]
    assert quantities == ["first token"] * 3 + ["decode"] * 3 + ["shared prefix", "unshared prefix"]
    for measured in report["measured"]:
        peer_can = not measured["quantity"].endswith("prefix")
        assert set(measured["seconds"]) == {"leanserve 1 rank"} | ({"transformers"} if peer_can else set())
        assert all(figure > 0 for figure in measured["figures"].values())
    assert report["ended_early"] is None


def test_figures_are_in_the_units_of_the_table():
    assert Measured(quantity="first token", context_tokens=100, batch=2, seconds={"a": 4.0}).figure("a") == 50
    assert Measured(quantity="decode", context_tokens=100, batch=1, seconds={"a": 0.25}).figure("a") == 250
    shared = Measured(quantity="shared prefix", context_tokens=100, batch=8, seconds={"a": 3.0})
    assert (shared.figure("a"), shared.figure("b")) == (3, None)


@pytest.mark.slow
def test_bench_multigpu_compares_rank_counts_over_gloo_too(tmp_path):
    printed, report = bench(tmp_path, "multigpu", "--device", "cpu", "--ranks", "1,2")
    assert "the same" in printed
    assert "GPUs, NCCL and CUDA graphs" in printed
    assert [ranks["differing_tokens"] for ranks in report["by_ranks"]] == [None, 0]
    for ranks in report["by_ranks"]:
        assert ranks["prefill_tokens_per_s"]["128"] > 0
        assert ranks["decode_ms"]["128"] > 0


def test_bench_multigpu_says_what_is_missing_here():
    count = usable_gpus().count
    with pytest.raises(ConfigError, match=f"{count + 1} ranks under NCCL need {count + 1} GPUs, and {count} can be"):
        CliRunner().invoke(bench_app, ["multigpu", "--ranks", str(count + 1)], catch_exceptions=False)


@pytest.mark.multigpu
def test_ranks_under_nccl_answer_as_one_does(tmp_path):
    size = torch.cuda.device_count()
    _, report = bench(tmp_path, "multigpu", "--ranks", f"1,{size}")
    assert report["by_ranks"][1]["differing_tokens"] == 0
