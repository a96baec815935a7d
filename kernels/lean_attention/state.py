"""Attention states and their merge.

Softmax attention of one query over a set A of keys, with logits s_i and values v_i, is the state

    lse_A = log sum_{i in A} exp(s_i)              out_A = sum_{i in A} exp(s_i - lse_A) v_i

For disjoint sets A and B

    lse_{A+B} = log(exp(lse_A) + exp(lse_B))
    out_{A+B} = exp(lse_A - lse_{A+B}) out_A + exp(lse_B - lse_{A+B}) out_B

which is exact, associative and commutative, with the identity (out 0, lse -inf): the state of no keys. A tile, a thread
block, a device and a whole context are all described by this one pair. (Online softmax: Milakov and Gimelshein,
arXiv 1805.02867; as an associative reduction: LeanAttention, arXiv 2405.10480.)

Shapes: N states, B sequences or tokens, H query heads, D head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lean_attention.backend import Backend, choose_backend, refuse_gradients
from lean_attention.operators import operator

OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class AttentionState(NamedTuple):
    """The attention of B x H queries over some set of keys."""

    out: Tensor
    """[B, H, D]: the softmax-weighted mean of the values; 0 where no key was seen."""

    lse: Tensor
    """[B, H] float32: natural log of the sum of exp(logit); -inf where no key was seen."""

    @classmethod
    def identity(
        cls, shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "AttentionState":
        """The state of no keys for queries of `shape` [B, H, D]: merging it changes nothing."""
        out = torch.zeros(tuple(shape), device=device, dtype=dtype)
        lse = torch.full(tuple(shape[:-1]), float("-inf"), device=device, dtype=torch.float32)
        return cls(out, lse)

    def merge(self, other: "AttentionState") -> "AttentionState":
        """The state of the union of two disjoint sets of keys (formula above)."""
        return merge_states(torch.stack((self.out, other.out)), torch.stack((self.lse, other.lse)))


def merge_states(out_NBHD: Tensor, lse_NBH: Tensor, *, backend: Backend | None = None) -> AttentionState:
    """Merge N states of disjoint sets of keys into the state of their union.

    out_NBHD is [N, B, H, D] float32, float16 or bfloat16; lse_NBH is [N, B, H] float32, natural log. The states are
    summed in float32, in the order given: equal inputs give equal bits. The result's `out` has the dtype of out_NBHD.
    A state whose lse is -inf takes no part, whatever its `out` holds (NaN included); if all are, the result is the
    identity.

    Raises ValueError on other shapes, dtypes or devices, and if autograd would record the call.
    """
    if out_NBHD.ndim != 4 or out_NBHD.shape[0] < 1 or tuple(lse_NBH.shape) != tuple(out_NBHD.shape[:3]):
        raise ValueError(
            f"merge_states got out {tuple(out_NBHD.shape)} and lse {tuple(lse_NBH.shape)}; needed: [N, B, H, D] and "
            "[N, B, H] with N at least 1"
        )
    if out_NBHD.dtype not in OUT_DTYPES or lse_NBH.dtype != torch.float32:
        raise ValueError(
            f"merge_states got out {out_NBHD.dtype} and lse {lse_NBH.dtype}; allowed: out float32, float16 or "
            "bfloat16, lse float32"
        )
    if out_NBHD.device != lse_NBH.device:
        raise ValueError(
            f"merge_states got out on {out_NBHD.device} and lse on {lse_NBH.device}; put both on one device"
        )
    refuse_gradients("merge_states", out_NBHD, lse_NBH)
    if choose_backend(backend, out_NBHD.device) == "triton":
        return AttentionState(*_merge_on_triton(out_NBHD, lse_NBH))
    return merge_in_torch(out_NBHD, lse_NBH)


def merge_in_torch(out_NBHD: Tensor, lse_NBH: Tensor) -> AttentionState:
    """merge_states in plain PyTorch, unchecked: the portable path, for any leading shape [N, ...]."""
    lse = torch.logsumexp(lse_NBH, dim=0)
    # Where every state is empty, -inf - -inf would be NaN.
    reachable = lse.masked_fill(lse == float("-inf"), 0.0)
    weight = torch.exp(lse_NBH - reachable).unsqueeze(-1)
    parts = out_NBHD.float().masked_fill(weight == 0, 0.0)
    return AttentionState((weight * parts).sum(dim=0).to(out_NBHD.dtype), lse)


def _empty_merged(out_NBHD: Tensor, lse_NBH: Tensor) -> tuple[Tensor, Tensor]:
    return out_NBHD.new_empty(out_NBHD.shape[1:]), lse_NBH.new_empty(lse_NBH.shape[1:])


@operator("lean_attention::merge_states", fake=_empty_merged)
def _merge_on_triton(out_NBHD: Tensor, lse_NBH: Tensor) -> tuple[Tensor, Tensor]:
    from lean_attention.merge import merge_states as merge_on_triton

    out, lse = merge_on_triton(out_NBHD, lse_NBH)
    return out, lse
