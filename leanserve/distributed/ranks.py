"""The group of ranks, as few collectives as the engine needs. Knows tensors, not attention."""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from leanserve.contracts.errors import DesyncError
from leanserve.distributed.stopwatch import Stopwatch

__all__ = ["Ranks"]

# torch 2.13 renames it, and warns at the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks.

    With one rank no process group exists and every collective is the identity. With Gloo and CUDA tensors (several
    ranks on one GPU) the bytes go through host memory.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    stages_through_host: bool
    in_collectives: Stopwatch = field(init=False)
    """Runs while bytes travel between ranks, waiting for the slowest of them included."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_collectives", Stopwatch(self.device))

    @classmethod
    def single(cls, device: torch.device) -> "Ranks":
        return cls(rank=0, size=1, device=device, group=None, stages_through_host=False)

    @classmethod
    def join(
        cls,
        *,
        rank: int,
        size: int,
        store: dist.Store,
        backend: str,
        device: torch.device,
        timeout_s: float = 1800.0,
    ) -> "Ranks":
        """Meet the other ranks at `store` and build the process group (`"nccl"` or `"gloo"`)."""
        if size == 1:
            return cls.single(device)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
        return cls(
            rank=rank,
            size=size,
            device=device,
            group=dist.group.WORLD,
            stages_through_host=backend == "gloo" and device.type != "cpu",
        )

    def leave(self) -> None:
        """Take the group down. Without this a clean exit looks like a failure to torchrun."""
        if self.group is not None:
            dist.destroy_process_group()

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Everybody's `mine` (same shape and dtype on all ranks), stacked by rank: [R, *mine.shape]."""
        if self.size == 1:
            return mine.unsqueeze(0)
        mine = mine.contiguous()
        with self.in_collectives:
            if self.stages_through_host:
                mine = mine.cpu()
            everybody = torch.empty((self.size * mine.numel(),), dtype=mine.dtype, device=mine.device)
            _all_gather(everybody, mine.view(-1), group=self.group)
            return everybody.view(self.size, *mine.shape).to(self.device)

    def all_to_all(self, mine: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        """Send rows of `mine`, grouped by receiver in rank order; returns what was received, grouped by sender.

        Args:
            send_rows, receive_rows: how many rows go to, and come from, each rank.
        """
        if self.size == 1:
            return mine
        mine = mine.contiguous()
        with self.in_collectives:
            if self.stages_through_host:
                mine = mine.cpu()
            received = mine.new_empty((sum(receive_rows), *mine.shape[1:]))
            dist.all_to_all_single(received, mine, receive_rows, send_rows, group=self.group)
            return received.to(self.device)

    def broadcast_from_rank_0(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x` on every rank. The others pass a tensor of the same shape and dtype, which may be written to."""
        if self.size == 1:
            return x
        with self.in_collectives:
            staged = x.cpu() if self.stages_through_host else x
            dist.broadcast(staged, src=0, group=self.group)
            return staged.to(self.device)

    def gather_ints(self, value: int) -> tuple[int, ...]:
        """Every rank's `value`, by rank."""
        return tuple(self.all_gather(torch.tensor([value], dtype=torch.int64, device=self.device)).flatten().tolist())

    def require_equal(self, value: int, what: str) -> None:
        """Raise DesyncError on every rank unless all ranks pass the same `value`."""
        values = self.gather_ints(value)
        for rank, seen in enumerate(values):
            if seen != values[0]:
                raise DesyncError(f"{what} differs between ranks: {values[0]} on rank 0, {seen} on rank {rank}")
