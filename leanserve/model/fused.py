"""What lies between a layer's matrix products, in one launch each: `layer_ops.LayerOps` as Triton kernels.

At batch 1 a small model's decode step on a GPU takes as long as its kernels take to start, so what counts is how many
there are. Those of a layer, with its four products, and with attention on one rank (append, decode):

    Llama, Mistral, Qwen2       10, where PyTorch's operators make 15
    Qwen3                       10, where they make 17 (18 for several tokens, whose heads it copies first)
    SmolLM3 without rotation     9, where they make 12

Appending keys and values to their pages stays a launch of attention's own: in one with the rotation it would save one
more, but the model would have to know pages, or attention rotations.

Rounding is that of `layers` on the CPU, and so transformers': what is rounded to the model's dtype between two
operators there is rounded here too, though it never leaves the registers.

Shapes: N tokens of a step, C width of the residual stream, H heads (of queries, then of keys), D head dim, J width of
the MLP; R rows of a program (a row is one head of one token).
"""

# Triton's kernel language is not Python's to a type checker.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_attention.operators import operator
from lean_attention.tuning import interpreting
from leanserve.model.rope import RotaryTable

__all__ = ["add_rms_norm", "norm_and_rotate", "rms_norm", "swiglu"]

ELEMENTS_PER_THREAD = 8
"""One load of 16 bytes of a 16-bit dtype."""


@triton.jit
def norm_kernel(
    x_ptr, delta_ptr, weight_ptr, out_ptr, eps, x_stride_n, delta_stride_n,
    WIDTH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One token: x += delta where there is one, then its norm."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    inside = c < WIDTH
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride_n + c, mask=inside, other=0.0)  # [C]
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row * delta_stride_n + c, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(dtype)
        tl.store(x_ptr + row * x_stride_n + c, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    normed = (x * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + c, (normed * weight.to(tl.float32)).to(dtype), mask=inside)


def norm_constants(width: int) -> dict[str, int]:
    """The constexpr arguments of `norm_kernel`."""
    return {"WIDTH": width, "C": triton.next_power_of_2(width)}


def norm_warps(width: int) -> int:
    return min(16, max(1, triton.next_power_of_2(width) // (32 * ELEMENTS_PER_THREAD)))


def _launch_norm(x_NC: Tensor, delta_NC: Tensor | None, weight_C: Tensor, eps: float) -> Tensor:
    rows, width = x_NC.shape
    assert x_NC.stride(1) == weight_C.stride(0) == 1
    assert weight_C.shape == (width,)
    if delta_NC is not None:
        assert delta_NC.shape == x_NC.shape
        delta_NC = delta_NC if delta_NC.stride(1) == 1 else delta_NC.contiguous()
    out_NC = torch.empty((rows, width), dtype=x_NC.dtype, device=x_NC.device)
    if rows > 0:
        norm_kernel[(rows,)](
            x_NC, delta_NC, weight_C, out_NC, eps, x_NC.stride(0), 0 if delta_NC is None else delta_NC.stride(0),
            **norm_constants(width), num_warps=norm_warps(width), enable_fp_fusion=True,
        )  # fmt: skip
    return out_NC


@operator("leanserve::rms_norm", fake=lambda x_NC, *others: x_NC.new_empty(x_NC.shape))
def _rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    return _launch_norm(x_NC, None, weight_C, eps)


@operator("leanserve::add_rms_norm", fake=lambda x_NC, *others: x_NC.new_empty(x_NC.shape), mutates_args=("x_NC",))
def _add_rms_norm(x_NC: Tensor, delta_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    return _launch_norm(x_NC, delta_NC, weight_C, eps)


def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """As `layers.rms_norm`, of a matrix."""
    return _rms_norm(x_NC, weight_C, eps)


def add_rms_norm(x_NC: Tensor, delta_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """As `layers.add_rms_norm`."""
    return _add_rms_norm(x_NC, delta_NC, weight_C, eps)


@triton.jit(do_not_specialize=["rows", "heads"])
def heads_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, eps, rows, heads, x_stride_n, x_stride_h, cos_stride_n, sin_stride_n,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, D2: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R rows in place, as two halves: the norm where there is a weight, the rotation where there is a cosine.

    An element is stored by whoever has used it and its partner, so that nobody reads what is new already.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # [R]
    n, h = row // heads, row % heads
    d = tl.arange(0, D2)
    dtype = x_ptr.dtype.element_ty
    in_low = (row < rows)[:, None] & (d < HALF)[None, :]  # [R, D / 2]
    in_high = (row < rows)[:, None] & (HALF + d < HEAD_DIM)[None, :]
    at_low = x_ptr + (n * x_stride_n + h * x_stride_h)[:, None] + d[None, :]
    low = tl.load(at_low, mask=in_low, other=0.0).to(tl.float32)
    high = tl.load(at_low + HALF, mask=in_high, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / HEAD_DIM + eps)[:, None]
        at_weight = weight_ptr + (h * HEAD_DIM)[:, None] + d[None, :]
        weight_low = tl.load(at_weight, mask=in_low, other=0.0).to(tl.float32)
        weight_high = tl.load(at_weight + HALF, mask=in_high, other=0.0).to(tl.float32)
        low = ((low * scale).to(dtype).to(tl.float32) * weight_low).to(dtype).to(tl.float32)
        high = ((high * scale).to(dtype).to(tl.float32) * weight_high).to(dtype).to(tl.float32)
    if cos_ptr is not None:
        at_cos = cos_ptr + (n * cos_stride_n)[:, None] + d[None, :]
        at_sin = sin_ptr + (n * sin_stride_n)[:, None] + d[None, :]
        cos_low = tl.load(at_cos, mask=in_low, other=0.0).to(tl.float32)
        cos_high = tl.load(at_cos + HALF, mask=in_high, other=0.0).to(tl.float32)
        sin_low = tl.load(at_sin, mask=in_low, other=0.0).to(tl.float32)
        sin_high = tl.load(at_sin + HALF, mask=in_high, other=0.0).to(tl.float32)
        rotated_low = (low * cos_low).to(dtype).to(tl.float32) + high * sin_low
        high = (high * cos_high).to(dtype).to(tl.float32) + low * sin_high
        low = rotated_low
    tl.store(at_low, low.to(dtype), mask=in_low)
    tl.store(at_low + HALF, high.to(dtype), mask=in_high)


HEADS_WARPS = 4


def heads_constants(head_dim: int, *, rows: int | None = None) -> dict[str, int]:
    """The constexpr arguments of `heads_kernel`."""
    half = head_dim - head_dim // 2
    block = triton.next_power_of_2(half)
    if rows is None:
        rows = max(1, 32 * HEADS_WARPS * ELEMENTS_PER_THREAD // block)
    return {"HEAD_DIM": head_dim, "HALF": half, "D2": block, "R": rows}


@operator("leanserve::norm_and_rotate", fake=lambda *arguments: None, mutates_args=("qk_NHD",))
def _norm_and_rotate(
    qk_NHD: Tensor, weight_HD: Tensor | None, eps: float, cos_N1D: Tensor | None, sin_N1D: Tensor | None
) -> None:
    tokens, heads, head_dim = qk_NHD.shape
    assert qk_NHD.stride(2) == 1
    assert weight_HD is None or (weight_HD.is_contiguous() and weight_HD.shape == (heads, head_dim))
    cos_stride = sin_stride = 0
    if cos_N1D is not None and sin_N1D is not None:
        assert cos_N1D.shape == sin_N1D.shape == (tokens, 1, head_dim)
        assert cos_N1D.stride(2) == sin_N1D.stride(2) == 1
        cos_stride, sin_stride = cos_N1D.stride(0), sin_N1D.stride(0)
    rows = tokens * heads
    if rows == 0:
        return
    # The interpreter's time goes by programs.
    constants = heads_constants(head_dim, rows=256 if interpreting() else None)
    heads_kernel[(triton.cdiv(rows, constants["R"]),)](
        qk_NHD, weight_HD, cos_N1D, sin_N1D, eps, rows, heads, *qk_NHD.stride()[:2], cos_stride, sin_stride,
        **constants, num_warps=HEADS_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def norm_and_rotate(qk_NHD: Tensor, weight_HD: Tensor | None, eps: float, table: RotaryTable | None) -> Tensor:
    """As `layers.norm_and_rotate`, in place."""
    cos_N1D, sin_N1D = (None, None) if table is None else (table.cos_N1D, table.sin_N1D)
    if weight_HD is not None or cos_N1D is not None:
        _norm_and_rotate(qk_NHD, weight_HD, eps, cos_N1D, sin_N1D)
    return qk_NHD


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, gate_up_stride_n, WIDTH: tl.constexpr, J: tl.constexpr):
    """J elements of one token."""
    blocks: tl.constexpr = (WIDTH + J - 1) // J
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * J + tl.arange(0, J)
    inside = j < WIDTH
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + row * gate_up_stride_n + j, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_stride_n + WIDTH + j, mask=inside, other=0.0).to(tl.float32)
    decay = tl.exp(-tl.abs(gate))  # of the negative side, where the exponential of the other sign would overflow
    silu = (gate * tl.where(gate < 0, decay, 1.0) / (1.0 + decay)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + j, (silu * up).to(dtype), mask=inside)


SWIGLU_WARPS = 4


def swiglu_constants(width: int) -> dict[str, int]:
    """The constexpr arguments of `swiglu_kernel`."""
    return {"WIDTH": width, "J": 32 * SWIGLU_WARPS * ELEMENTS_PER_THREAD}


def _empty_gated(gate_up_NJ: Tensor) -> Tensor:
    return gate_up_NJ.new_empty((gate_up_NJ.shape[0], gate_up_NJ.shape[1] // 2))


@operator("leanserve::swiglu", fake=_empty_gated)
def _swiglu(gate_up_NJ: Tensor) -> Tensor:
    rows, width = gate_up_NJ.shape[0], gate_up_NJ.shape[1] // 2
    assert gate_up_NJ.shape[1] == 2 * width
    assert gate_up_NJ.stride(1) == 1
    out_NJ = torch.empty((rows, width), dtype=gate_up_NJ.dtype, device=gate_up_NJ.device)
    if out_NJ.numel() > 0:
        constants = swiglu_constants(width)
        swiglu_kernel[(rows * triton.cdiv(width, constants["J"]),)](
            gate_up_NJ, out_NJ, gate_up_NJ.stride(0),
            **constants, num_warps=SWIGLU_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out_NJ


def swiglu(gate_up_NJ: Tensor) -> Tensor:
    """As `layers.swiglu`."""
    return _swiglu(gate_up_NJ)
