"""Writing new tokens' keys and values into the pages of this shard, in one launch.

Shapes: K KV heads, D head dim (both padded to a power of two), P pages, T tokens of a page.
"""

# Triton's kernel language is not Python's to a type checker.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_attention.paged_kv import FP8_MAX, PagedKV


@triton.jit
def _write_token(
    new_ptr, pool_ptr, scale_ptr, page, slot, kv_heads,
    new_stride_h, stride_p, stride_h, stride_t,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    h, d = tl.arange(0, HEADS), tl.arange(0, D)
    inside = (h[:, None] < kv_heads) & (d[None, :] < HEAD_DIM)  # [K, D]
    values = tl.load(new_ptr + h[:, None] * new_stride_h + d[None, :], mask=inside, other=0.0)
    if LIMIT is not None:
        values = values.to(tl.float32)
        if scale_ptr is not None:
            values = values / tl.load(scale_ptr)
        values = tl.minimum(tl.maximum(values, -LIMIT), LIMIT)
    to = pool_ptr + page * stride_p + slot * stride_t + h[:, None].to(tl.int64) * stride_h + d[None, :]
    tl.store(to, values.to(pool_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["kv_heads"])
def append_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, pages_ptr, slots_ptr, kv_heads,
    k_new_stride_n, k_new_stride_h, v_new_stride_n, v_new_stride_h,
    k_stride_p, k_stride_h, k_stride_t, v_stride_p, v_stride_h, v_stride_t,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One token: all its heads, K and V."""
    token = tl.program_id(0).to(tl.int64)
    page = tl.load(pages_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    # A negative page: another shard owns the token.
    if page >= 0:
        _write_token(
            k_new_ptr + token * k_new_stride_n, k_ptr, k_scale_ptr, page, slot, kv_heads,
            k_new_stride_h, k_stride_p, k_stride_h, k_stride_t, HEAD_DIM, D, HEADS, LIMIT,
        )  # fmt: skip
        _write_token(
            v_new_ptr + token * v_new_stride_n, v_ptr, v_scale_ptr, page, slot, kv_heads,
            v_new_stride_h, v_stride_p, v_stride_h, v_stride_t, HEAD_DIM, D, HEADS, LIMIT,
        )  # fmt: skip


def append_constants(kv_heads: int, head_dim: int, kv_dtype: torch.dtype) -> dict[str, int | float | None]:
    """The constexpr arguments of `append_kernel`."""
    return {
        "HEAD_DIM": head_dim,
        "D": triton.next_power_of_2(head_dim),
        "HEADS": triton.next_power_of_2(kv_heads),
        "LIMIT": FP8_MAX if kv_dtype == torch.float8_e4m3fn else None,
    }


def append_kv(k_new: Tensor, v_new: Tensor, kv: PagedKV, pages: Tensor, slots: Tensor) -> None:
    """`lean_attention.append_kv` on the device: k_new and v_new [tokens, K, D], pages and slots [tokens] int32."""
    tokens, K, D = k_new.shape
    if tokens == 0:
        return
    if D > 1 and k_new.stride(2) != 1:
        k_new = k_new.contiguous()
    if D > 1 and v_new.stride(2) != 1:
        v_new = v_new.contiguous()
    constants = append_constants(K, D, kv.k.dtype)
    append_kernel[(tokens,)](
        k_new, v_new, kv.k, kv.v, kv.k_scale, kv.v_scale, pages, slots, K,
        *k_new.stride()[:2], *v_new.stride()[:2], *kv.k.stride()[:3], *kv.v.stride()[:3],
        **constants, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
