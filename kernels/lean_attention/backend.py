"""Which implementation serves an operator: the Triton kernels or the portable PyTorch path.

triton     CUDA and ROCm tensors where Triton is installed; CPU tensors under TRITON_INTERPRET=1 (tests)
portable   everything else
"""

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["triton", "portable"]


def choose_backend(requested: Backend | None, device: torch.device) -> Backend:
    """The backend for tensors on `device`; `requested` wins where it can run.

    Raises ValueError if `requested` is no backend, or is "triton" where Triton cannot run.
    """
    if requested is not None and requested not in get_args(Backend):
        raise ValueError(f"backend is {requested!r}; allowed: 'triton', 'portable', or None to choose by device")
    if requested == "portable":
        return "portable"
    # The interpreter is asked for through the environment, before Triton is imported; Triton reads the same variable.
    runs_triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if runs_triton and find_spec("triton") is not None:
        return "triton"
    if requested == "triton":
        raise ValueError(
            f"backend 'triton' cannot run on {device.type} tensors here; it needs the triton package and a CUDA or "
            "ROCm device, or TRITON_INTERPRET=1 in the environment; use backend='portable'"
        )
    return "portable"


def refuse_gradients(operator: str, *tensors: torch.Tensor | None) -> None:
    """Raise ValueError if autograd would record the call: these operators have no backward pass."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            f"{operator} has no backward pass and an input requires grad; call it under torch.no_grad() or "
            "torch.inference_mode(), or detach the inputs"
        )
