"""Numbers between host and device without making the host wait: what a step that is launched early must not do."""

import numpy as np
import torch

__all__ = ["Download", "upload"]


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Host values on the device, in the order of its work. (A copy from memory that is not pinned may wait for all that
    the device was asked for before.)"""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        host = host.pin_memory()  # the allocator keeps it until the copy is done
    return host.to(device, non_blocking=True)


class Download:
    """A device tensor on its way to the host, behind all that the device was asked for before. On the CPU it is there:
    it must not be written to before `wait`."""

    def __init__(self, values: torch.Tensor) -> None:
        self._host = values
        self._arrived: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> torch.Tensor:
        """The values, in host memory."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
