"""What the processes of `leanserve doctor` tell each other. Knows no torch, which may be what is broken."""

import msgspec

from leanserve.contracts.config import EngineConfig

__all__ = ["TRIAL_FILE", "TRIAL_ORDERS_FILE", "GatherTime", "Gpu", "TorchFacts", "Trial", "TrialOrders"]

TRIAL_ORDERS_FILE, TRIAL_FILE = "trial-orders.json", "trial.json"
"""In the run directory."""


class Gpu(msgspec.Struct, frozen=True):
    name: str
    capability: str
    memory_gib: float
    peers: list[int]
    """GPUs whose memory it reads and writes without the host's."""


class TorchFacts(msgspec.Struct, frozen=True):
    torch: str
    cuda: str | None
    """That torch was built for; of a ROCm build, its HIP version."""
    nccl: str | None
    gpus: list[Gpu]
    usable_gpus: int
    reason: str | None
    """Why none is usable, and what to do."""


class TrialOrders(msgspec.Struct, frozen=True):
    """What rank 0 of a trial is to do."""

    config: EngineConfig
    front_end_pid: int


class GatherTime(msgspec.Struct, frozen=True):
    """How long all-gathers of one size took, on rank 0."""

    num_bytes: int
    """That each rank gave."""
    median_us: float
    worst_us: float


class Trial(msgspec.Struct, frozen=True):
    """What rank 0 found."""

    ranks: int
    backend: str
    device: str
    met_s: float
    """From rank 0's first line to a working group."""
    gathers: list[GatherTime]
