"""`import lean_attention` needs torch and nothing else; Triton is imported only where it runs."""

import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"

SCRIPT = """
import sys

import torch

BLOCKED = {"triton", "leanserve", "numpy", "transformers", "msgspec"}
for name in list(sys.modules):
    if name.split(".")[0] in BLOCKED:
        del sys.modules[name]
for name in BLOCKED:
    sys.modules[name] = None  # what Python takes for "not installed"
import lean_attention
k = torch.randn(1, 2, 40, 64)
kv = lean_attention.PagedKV.from_contiguous(k, k, torch.tensor([40], dtype=torch.int32))
state = lean_attention.lean_decode(torch.randn(1, 4, 64), kv, lean_attention.plan_decode(kv, 4))
assert state.out.shape == (1, 4, 64), state.out.shape
assert all(sys.modules[name] is None for name in BLOCKED)
"""


def test_torch_is_all_it_needs():
    environment = {"PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, check=True, timeout=120)


def test_the_public_names_are_the_ones_that_are_documented():
    import lean_attention

    assert set(lean_attention.__all__) == {
        "AttentionState", "Backend", "DecodePlan", "PagedKV", "append_kv", "lean_decode", "lean_prefill",
        "merge_states", "plan_decode", "reference",
    }  # fmt: skip
    assert all(hasattr(lean_attention, name) for name in lean_attention.__all__)
