"""Who computes what lies between a layer's matrix products: PyTorch, or one kernel for each operation."""

from typing import Protocol

import torch
from torch import Tensor

from lean_attention import Backend
from lean_attention.backend import choose_backend
from leanserve.model import layers
from leanserve.model.rope import RotaryTable

__all__ = ["LayerOps", "choose_layer_ops"]


class LayerOps(Protocol):
    """The operations of `layers` that `fused` has too; what they do is said there."""

    def rms_norm(self, x_NC: Tensor, weight_C: Tensor, eps: float, /) -> Tensor: ...

    def add_rms_norm(self, x_NC: Tensor, delta_NC: Tensor, weight_C: Tensor, eps: float, /) -> Tensor: ...

    def norm_and_rotate(
        self, qk_NHD: Tensor, weight_HD: Tensor | None, eps: float, table: RotaryTable | None, /
    ) -> Tensor: ...

    def swiglu(self, gate_up_NJ: Tensor, /) -> Tensor: ...


def choose_layer_ops(backend: Backend | None, device: torch.device) -> LayerOps:
    """The operations for tensors on `device`: "triton" is `fused`, "portable" is PyTorch, None the device's own.

    Raises:
        ValueError: "triton" cannot run there.
    """
    if choose_backend(backend, device) == "portable":
        return layers
    from leanserve.model import fused  # Triton is not everywhere

    return fused
