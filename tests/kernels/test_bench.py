"""The benchmark command, on the CPU: what it writes, and that a wrong result is never timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "bench_decode.py"


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, after the Python statements in `before`."""
    program = f"{before}\nimport runpy\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    paths = os.pathsep.join(map(str, (ROOT / "kernels", SCRIPT.parent)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program, "--device", "cpu", "--quick", "--only", "1 x 1k", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_a_run_leaves_a_result_a_plot_and_a_table(tmp_path):
    broken = """
import contenders
def broken(caches):
    raise RuntimeError("no compiler here")
contenders.CPU_CONTENDERS["broken"] = broken
"""
    finished = run("--out", str(tmp_path / "new"), "--contenders", "lean,SDPA,broken", before=broken)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert {"device", "versions", "commit", "date", "gate_max_error", "read_gbps"} <= set(result["about"])
    failed = [row for row in result["rows"] if row["contender"] == "broken"]
    assert [row["skipped"] for row in failed] == ["failed: RuntimeError: no compiler here"] * 2
    assert "broken: failed: RuntimeError" in finished.stdout
    assert result["about"]["cases_left_out"] == 0
    measured = {(row["contender"], row["dtype"]): row for row in result["rows"] if row not in failed}
    assert set(measured) == {(c, d) for c in ("lean", "SDPA") for d in ("float32", "bfloat16")}
    for row in measured.values():
        assert row["us"] > 0
        assert abs(row["gbps"] - row["kv_bytes"] / row["us"] / 1e3) < 0.01
    assert (tmp_path / "new" / "decode.png").stat().st_size > 10_000
    assert "lean over SDPA" in finished.stdout.splitlines()[-1]


@pytest.mark.parametrize(("error", "timed"), [("1e-3", {"bfloat16"}), ("1.0", set())])
def test_a_wrong_result_shuts_the_gate_for_its_dtype_and_a_failure_costs_its_own_rows(error, timed, tmp_path):
    spoil = f"""
import contenders
def broken(caches):
    raise RuntimeError("out of resources")
contenders.CPU_CONTENDERS["lean broken"] = broken
from lean_attention import portable
right = portable.decode
def wrong(*arguments, **options):
    state = right(*arguments, **options)
    return state._replace(out=state.out + {error})
portable.decode = wrong
"""
    finished = run("--out", str(tmp_path), "--contenders", "lean broken,lean", before=spoil)
    assert finished.returncode == 1
    assert "the gate is shut for float32: lean_decode 32/8/128" in finished.stderr
    assert ("nothing was timed" in finished.stderr) == (not timed)
    result = tmp_path / "result.json"
    assert result.exists() == bool(timed)
    rows = json.loads(result.read_text())["rows"] if timed else []
    assert {row["dtype"] for row in rows if row.get("us")} == timed
    failed = [row["wrong"] for row in rows if row["contender"] == "lean broken"]
    assert failed == ["failed: RuntimeError: out of resources"] * len(timed)


def test_an_unknown_contender_is_refused(tmp_path):
    finished = run("--out", str(tmp_path), "--contenders", "XQA")
    assert finished.returncode == 2
    assert "unknown contenders ['XQA']" in finished.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the yardstick is a Triton kernel")
def test_the_yardstick_reads_everything(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from read_kernel import reader

    pool = torch.zeros(5 * 4096, dtype=torch.int32)
    pool[-1], pool[0] = 7, 3
    assert int(reader(pool)().max()) == 7
    pool[-1] = 0
    assert int(reader(pool)().max()) == 3


def test_the_grids_hold_what_they_promise(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import cases
    from contenders import flash_decoding_splits

    grid = cases.full_grid()
    assert len({(c.name, c.page_tokens, c.family) for c in grid}) == len(grid)
    assert {c.page_tokens for c in grid} == {16, 64, 128}
    assert max(c.tokens for c in grid if len(c.lengths) == 1) == 1 << 20
    assert set(cases.quick_grid()) & set(grid)
    assert cases.ragged((1, 64 * 1024), (31, 4096)).name == "1x64k + 31x4k  32/8/128"
    # 8 rows on 132 processors: 16 pieces fill 128 of them; a full grid is not split.
    assert flash_decoding_splits(8, 132, 256) == 15
    assert flash_decoding_splits(132, 132, 256) == 1
