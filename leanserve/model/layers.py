"""The decoder's arithmetic: its products, and what lies between them, in PyTorch.

N tokens of a step (all sequences together), C inputs, J outputs of a projection, H heads (of queries, then of keys), D
head dim.
"""

import platform
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from leanserve.model.rope import RotaryTable, rotate

__all__ = ["Linear", "add_rms_norm", "norm_and_rotate", "rms_norm", "swiglu"]

_SMALLEST_PACKED = 1 << 18
"""Elements. Below, the 20 microseconds that a call of a packed projection costs are more than it saves."""


class Linear:
    """A projection `x @ weight.T + bias` whose weight is [J, C] and contiguous, as checkpoints store it.

    At batch 1 on a CPU a decode step is the time it takes to read the weights once, and so it should be at batch 8. It
    is not with the general matrix product: for 2 to 16 rows that takes two to three times as long. `pack` therefore
    hands the weight to oneDNN in the layout its kernels read, after loading.
    """

    def __init__(
        self, outputs: int, inputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.weight_JC: Tensor | None = torch.empty(outputs, inputs, dtype=dtype, device=device)
        """None once packed."""
        self.bias_J = torch.empty(outputs, dtype=dtype, device=device) if bias else None
        self._packed: Tensor | None = None

    def __call__(self, x_NC: Tensor) -> Tensor:
        """[N, J] in the dtype of x."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x_NC, self._packed, self.bias_J, "none", [], "")
        assert self.weight_JC is not None
        return F.linear(x_NC, self.weight_JC, self.bias_J)

    def pack(self) -> None:
        """Re-lay the weight for this CPU, where that is known to be faster; the plain weight is given up."""
        if self.weight_JC is not None and _can_pack(self.weight_JC):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight_JC, None)
            self.weight_JC = None


def _can_pack(weight_JC: Tensor) -> bool:
    """Whether oneDNN has fast kernels here: x86-64, float32 or, with AVX-512, bfloat16."""
    if weight_JC.numel() < _SMALLEST_PACKED:
        return False
    if weight_JC.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return _packs(weight_JC.dtype)


@lru_cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this torch has packed products for `dtype`, and they are right. They are private to torch: a small one is
    tried."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    x_NC, weight_JC = torch.eye(16, dtype=dtype), torch.arange(256, dtype=torch.float32).to(dtype).view(16, 16)
    try:
        if dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported():
            return False
        product = ops._linear_pointwise(x_NC, ops._reorder_linear_weight(weight_JC, None), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product, weight_JC.T)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich, 2019), statistics in float32.

    Args:
        weight: [last dimension], or None for none.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # On the CPU torch's own takes ten times as long for a few hundred rows.
    x32 = x.float()
    scale = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = (x32 * scale).to(x.dtype)
    return normed if weight is None else normed.mul_(weight)


def add_rms_norm(x_NC: Tensor, delta_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Add to the residual stream x in place, and return its norm."""
    x_NC += delta_NC
    return rms_norm(x_NC, weight_C, eps)


def norm_and_rotate(qk_NHD: Tensor, weight_HD: Tensor | None, eps: float, table: RotaryTable | None) -> Tensor:
    """Queries and keys as attention wants them. What they were is gone: it may be done in place.

    Args:
        qk_NHD: D is contiguous, the other strides are not.
        weight_HD: of each head's RMSNorm, or None for no norm.
        table: of the rotation, or None for none.
    """
    if weight_HD is not None:
        qk_NHD = rms_norm(qk_NHD, None, eps).mul_(weight_HD)
    return qk_NHD if table is None else rotate(qk_NHD, table)


def swiglu(gate_up_NJ: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of the last dimension (Shazeer, 2020), [N, J / 2]."""
    gate, up = gate_up_NJ.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
