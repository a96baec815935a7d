"""Prefill attention: many query tokens per sequence against that sequence's paged keys, causal by absolute position.

Shapes: B sequences, N query tokens of all sequences, H query heads, K KV heads, D head dim.
"""

import torch
from torch import Tensor

from lean_attention.backend import Backend, choose_backend
from lean_attention.decode import check_softmax_options, check_window
from lean_attention.operators import operator
from lean_attention.paged_kv import PagedKV, check_queries
from lean_attention.state import AttentionState


def lean_prefill(
    q: Tensor,
    kv: PagedKV,
    q_offsets: Tensor,
    q_positions: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> AttentionState:
    """Attention of each query token over the keys of its sequence that are at or before it.

    q            [N, H, D] in the dtype of kv (any of float32, float16, bfloat16 for a float8_e4m3fn kv).
    q_offsets    [B + 1] int32, from 0 to N, never falling: sequence b has tokens q_offsets[b] up to q_offsets[b + 1].
    q_positions  [N] int32: each token's absolute position; a key at position p is seen if p <= q_position.
    window       see only the last `window` positions, the query's own included.
    scale, softcap, sinks, out_dtype, backend: as in `lean_decode`.

    Returns AttentionState: out [N, H, D] out_dtype, lse [N, H] float32 natural log: partial where kv is a shard. A
    token that sees no key has out 0 and lse -inf (or the sink's logit).
    Raises ValueError where an argument does not fit the others or requires grad.
    """
    check_queries("lean_prefill", q, kv)
    for name, ids, shape in (
        ("q_offsets", q_offsets, (kv.num_sequences + 1,)),
        ("q_positions", q_positions, (q.shape[0],)),
    ):
        if ids.dtype != torch.int32 or tuple(ids.shape) != shape or ids.device != q.device:
            raise ValueError(
                f"lean_prefill got {name} {ids.dtype} {tuple(ids.shape)} on {ids.device}; needed: int32 {list(shape)} "
                f"on {q.device}"
            )
    check_window("lean_prefill", window)
    check_softmax_options("lean_prefill", q, softcap, sinks, out_dtype)
    scale = kv.head_dim**-0.5 if scale is None else float(scale)
    out, lse = _prefill(
        q, kv.k, kv.v, kv.page_table, kv.lengths, kv.page_positions, kv.k_scale, kv.v_scale, q_offsets, q_positions,
        sinks, scale, window, softcap, out_dtype, choose_backend(backend, q.device),
    )  # fmt: skip
    return AttentionState(out, lse)


def _empty_states(q, k, v, page_table, lengths, page_positions, k_scale, v_scale, q_offsets, q_positions, sinks, scale,
                  window, softcap, out_dtype, backend):  # fmt: skip
    return q.new_empty(q.shape, dtype=out_dtype), q.new_empty(q.shape[:2], dtype=torch.float32)


@operator("lean_attention::prefill", fake=_empty_states)
def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page_positions: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    q_offsets: Tensor,
    q_positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kv = PagedKV(k, v, page_table, lengths, page_positions, k_scale, v_scale)
    if backend == "triton":
        from lean_attention.flash_prefill import prefill
    else:
        from lean_attention.portable import prefill
    out, lse = prefill(q, kv, q_offsets, q_positions, scale=scale, window=window, softcap=softcap, sinks=sinks)
    return out.to(out_dtype), lse
