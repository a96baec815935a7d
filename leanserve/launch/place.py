"""This process among the ranks, as torchrun tells it."""

import os
from dataclasses import dataclass

from leanserve.contracts.machine import this_machine

__all__ = ["NODE_RANK_VARIABLE", "Place"]

NODE_RANK_VARIABLE = "LEANSERVE_NODE_RANK"
"""Set where `leanserve serve` started the agent: torchrun numbers machines as it likes, and rank 0 must be where the
front end is."""


@dataclass(frozen=True)
class Place:
    rank: int
    size: int
    local_rank: int
    local_size: int
    agent_pid: int
    host: str = ""
    """The machine, for people and to know whose process ids are whose."""

    @classmethod
    def from_environment(cls) -> "Place":
        local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        node_rank = os.environ.get(NODE_RANK_VARIABLE)
        return cls(
            rank=int(os.environ["RANK"]) if node_rank is None else int(node_rank) * local_size + local_rank,
            size=int(os.environ["WORLD_SIZE"]),
            local_rank=local_rank,
            local_size=local_size,
            agent_pid=os.getppid(),
            host=this_machine(),
        )
