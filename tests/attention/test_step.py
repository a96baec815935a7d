"""One step's attention on one rank, and beside a rank that holds the same keys."""

import math
import sys

import pytest
import torch

from leanserve.attention.kv_shard import KvShard
from leanserve.attention.step import SequencePages, StepAttention, StepLayout
from leanserve.distributed.ranks import Ranks

CPU = torch.device("cpu")
H, K, D = 4, 2, 8


class Twins(Ranks):
    """Two ranks that say the same."""

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.stack((mine, mine))


@pytest.fixture
def no_triton(monkeypatch):
    """Triton would be chosen here, and cannot be imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in ("append", "merge", "stream_k", "flash_prefill"):
        monkeypatch.setitem(sys.modules, f"lean_attention.{module}", None)


@pytest.mark.parametrize(
    "ranks", [Ranks.single(CPU), Twins(0, 2, CPU, None, stages_through_host=False)], ids=["one", "twins"]
)
@pytest.mark.usefixtures("no_triton")
def test_a_backend_that_is_asked_for_does_all_of_it(ranks):
    shard = KvShard(
        num_layers=1, num_pages=1, num_kv_heads=K, page_tokens=16, head_dim=D, dtype=torch.float32, device=CPU
    )
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    pages = SequencePages(zero[None], one, zero[None])
    layout = StepLayout(zero, zero, zero, decode=pages, prefill=None, share=None)
    attend = StepAttention(layout, shard, ranks, num_heads=H, windows=(None,), backend="portable")
    q, k, v = torch.randn(1, H, D), torch.randn(1, K, D), torch.randn(1, K, D)
    torch.testing.assert_close(attend(0, q, k, v), v.repeat_interleave(H // K, dim=1))
    assert math.isclose(float(shard.pool_L2PKTD[0, 0, 0, 1, 0, 3]), float(k[0, 1, 3]))
