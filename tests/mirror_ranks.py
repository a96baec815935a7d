"""A group of ranks without the others."""

import torch

from lean_attention import Backend
from leanserve.attention.kv_shard import KvShard
from leanserve.distributed.ranks import Ranks
from leanserve.model.architecture import Architecture
from leanserve.model.decoder import Decoder
from leanserve.model.partition import WeightSplit

__all__ = ["MirrorRanks", "mirrored_rank"]


class MirrorRanks(Ranks):
    """A group in which everybody says what this rank says, without a process group: shapes as in a real one."""

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.stack([mine] * self.size)

    def all_to_all(self, mine: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        return mine.new_zeros((sum(receive_rows), *mine.shape[1:]))

    def broadcast_from_rank_0(self, x: torch.Tensor) -> torch.Tensor:
        return x


def mirrored_rank(
    architecture: Architecture,
    num_ranks: int,
    *,
    num_pages: int,
    page_tokens: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    split: WeightSplit = "replicated",
    backend: Backend | None = None,
) -> tuple[Decoder, KvShard]:
    """What rank 0 of such a group holds; no weights are loaded. The decoder has the ranks."""
    ranks = MirrorRanks(rank=0, size=num_ranks, device=device, group=None, stages_through_host=False)
    decoder = Decoder(architecture, ranks=ranks, split=split, dtype=dtype, device=device, backend=backend)
    shard = KvShard(
        num_layers=architecture.num_layers,
        num_pages=num_pages,
        num_kv_heads=architecture.num_kv_heads,
        page_tokens=page_tokens,
        head_dim=architecture.head_dim,
        dtype=dtype,
        device=device,
    )
    return decoder, shard
