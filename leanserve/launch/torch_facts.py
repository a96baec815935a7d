"""What torch says of itself and of the GPUs: `python -m leanserve.launch.torch_facts` prints it as JSON.

In a process of its own: a torch that cannot be loaded, or that crashes while it looks at a GPU, is a finding too.
"""

import sys

import msgspec
import torch
import torch.distributed as dist
from torch.cuda import nccl

from leanserve.launch.doctor_facts import Gpu, TorchFacts
from leanserve.worker.device import usable_gpus

__all__ = ["torch_facts"]


def torch_facts() -> TorchFacts:
    """Look."""
    usable = usable_gpus()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_nccl = torch.version.cuda is not None and dist.is_nccl_available()
    gpus: list[Gpu] = []
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        peers = [other for other in range(count) if other != index and torch.cuda.can_device_access_peer(index, other)]
        gpus.append(Gpu(found.name, f"{found.major}.{found.minor}", round(found.total_memory / 2**30, 1), peers))
    return TorchFacts(
        torch=str(torch.__version__),
        cuda=torch.version.cuda or torch.version.hip,
        nccl=".".join(map(str, nccl.version())) if has_nccl else None,
        gpus=gpus,
        usable_gpus=usable.count,
        reason=usable.reason,
    )


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(torch_facts()).decode() + "\n")
