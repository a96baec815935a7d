"""Whether launching work would make the host wait for a GPU, found out on a machine that has none.

The device is "meta", which has no numbers: to read one is an error by itself. What a GPU would quietly wait for is
found by what operators are called with: a tensor that no operator made was made of Python's numbers, and the copy of
those to a GPU waits, for they do not lie in pinned memory.
"""

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capture_tape import refuse_waits, storage_of
from leanserve.worker import transfers

__all__ = ["DeviceWatch", "HostWaitError"]


class HostWaitError(Exception):
    """The host would wait for the device."""


class DeviceWatch(TorchDispatchMode):
    """Refuses, inside `with`, what would make the host wait. `transfers` alone may move numbers to and fro.

    Args:
        resident: storages on the device before.
    """

    def __init__(self, resident: set[int]) -> None:
        super().__init__()
        self._known = set(resident)
        self._made: list[torch.Tensor] = []
        """Kept, so that no other tensor gets its storage's address."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        refuse_waits(name, args, HostWaitError)
        result = func(*args, **kwargs)
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        if not _in_transfers():
            for tensor in given:
                if storage_of(tensor) not in self._known:
                    raise HostWaitError(f"{name} reads a tensor {tuple(tensor.shape)} made of Python's numbers")
            for tensor in (*given, *made):
                if tensor.device.type != "meta":
                    raise HostWaitError(f"{name} has a tensor of shape {tuple(tensor.shape)} on the {tensor.device}")
        self._known |= {storage_of(tensor) for tensor in made}
        self._made += made
        return result


def _in_transfers() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == transfers.__file__:
            return True
        frame = frame.f_back
    return False
