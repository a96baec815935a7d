"""The decoder's arithmetic as plain functions on tensors.

N tokens of a step (all sequences together), C hidden, J any width, H query heads, K KV heads, D head dim.
Projection weights are [outputs, inputs], contiguous, as checkpoints store them: at batch 1 on a CPU a decode step is
the time it takes to read them once.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear", "rms_norm", "swiglu"]


def linear(x_NC: Tensor, weight_JC: Tensor, bias_J: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, [N, J]."""
    return F.linear(x_NC, weight_JC, bias_J)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich, 2019), statistics in float32."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate_up_NJ: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of the last dimension (Shazeer, 2020), [N, J / 2]."""
    gate, up = gate_up_NJ.chunk(2, dim=-1)
    return F.silu(gate) * up
