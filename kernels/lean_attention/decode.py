"""Decode attention: one new query token per sequence against that sequence's paged keys.

Shapes: B sequences, H query heads, K KV heads, D head dim.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lean_attention import portable
from lean_attention.backend import Backend, choose_backend, refuse_gradients
from lean_attention.kv_tiles import KvTiles
from lean_attention.operators import operator
from lean_attention.paged_kv import PagedKV, check_queries
from lean_attention.state import OUT_DTYPES, AttentionState

if TYPE_CHECKING:
    from lean_attention.stream_k import StreamKPlan


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """How one step's decode attention is dealt out. Made once per step by `plan_decode`, read by every layer.

    It describes lengths and pages, not contents: any layer whose PagedKV has the same page_table, lengths and
    page_positions may use it.
    """

    num_heads: int
    """H, the query heads."""

    window: int | None
    """Only the last `window` positions are seen, the query's own included. None means all."""

    q_positions: Tensor | None
    """[B] int32: each query's absolute position. None means lengths - 1."""

    backend: Backend
    """The backend the plan was made for."""

    stream_k: "StreamKPlan | None" = None
    """The deal of tiles to CTAs; on backend "triton" only."""

    tiles: KvTiles | None = None
    """The tiles and their page ids; on backend "portable" only."""


def plan_decode(
    kv: PagedKV,
    num_heads: int,
    *,
    window: int | None = None,
    q_positions: Tensor | None = None,
    num_ctas: int | None = None,
    backend: Backend | None = None,
) -> DecodePlan:
    """Plan one step of `lean_decode` for `num_heads` query heads over `kv`.

    window       see only the last `window` positions, the query's own included (at least 1).
    q_positions  [B] int32, each query's absolute position; default lengths - 1. A window over a shard (a kv with
                 page_positions) needs it. Keys are taken to be at or before the query: only a window reads positions.
    num_ctas     the Triton grid; default: what the device holds. Ignored by "portable", which has no grid.
    backend      "triton" or "portable"; default: by device.

    On CUDA the plan is computed on the device, without synchronisation, so it can be captured in a graph.
    Raises ValueError on head counts, windows or positions that cannot be.
    """
    if num_heads < 1 or num_heads % kv.num_kv_heads:
        raise ValueError(
            f"plan_decode got {num_heads} query heads for {kv.num_kv_heads} KV heads; needed: a positive multiple"
        )
    check_window("plan_decode", window)
    if num_ctas is not None and num_ctas < 1:
        raise ValueError(f"plan_decode got num_ctas {num_ctas}; needed: at least 1, or None for the device's number")
    if q_positions is not None:
        if q_positions.dtype != torch.int32 or q_positions.shape != kv.lengths.shape:
            raise ValueError(
                f"plan_decode got q_positions {q_positions.dtype} {tuple(q_positions.shape)}; needed: int32 "
                f"[{kv.num_sequences}]"
            )
        if q_positions.device != kv.device:
            raise ValueError(f"plan_decode got q_positions on {q_positions.device} and KV on {kv.device}")
    elif window is not None and kv.page_positions is not None:
        raise ValueError(
            "plan_decode got a window over pages with page_positions but no q_positions; pass each query's absolute "
            "position: lengths count only the tokens of this shard"
        )
    backend = choose_backend(backend, kv.device)
    if backend == "triton":
        from lean_attention.stream_k import plan_stream_k

        stream_k = plan_stream_k(kv, num_heads, window=window, q_positions=q_positions, num_ctas=num_ctas)
        return DecodePlan(num_heads, window, q_positions, backend, stream_k=stream_k)
    tiles = portable.plan_decode(kv, window=window, q_positions=q_positions)
    return DecodePlan(num_heads, window, q_positions, backend, tiles=tiles)


def lean_decode(
    q: Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> AttentionState:
    """Attention of one query token per sequence over the keys in `kv`.

    q          [B, H, D] in the dtype of kv (any of float32, float16, bfloat16 for a float8_e4m3fn kv).
    plan       from `plan_decode`, for this step's page_table and lengths.
    scale      multiplies q . k; default 1 / sqrt(D).
    softcap    logits become softcap * tanh(logit / softcap); positive. Default: none.
    sinks      [H] float32 logits that join the softmax without a value; neither scaled nor capped. Where a context is
               sharded, pass them on one shard only.
    out_dtype  float32, float16 or bfloat16. States that will be merged want float32.
    backend    "triton" or "portable"; default: the plan's. A plan for the other backend is made anew in every call.

    Returns AttentionState: out [B, H, D] out_dtype, lse [B, H] float32 natural log. A sequence without keys has out 0
    and lse -inf (or the sink's logit). Raises ValueError where an argument does not fit the others or requires grad.
    """
    check_queries("lean_decode", q, kv)
    if q.shape[0] != kv.num_sequences or q.shape[1] != plan.num_heads:
        raise ValueError(
            f"lean_decode got q {tuple(q.shape)} for {kv.num_sequences} sequences and a plan for {plan.num_heads} "
            f"query heads; needed: [{kv.num_sequences}, {plan.num_heads}, {kv.head_dim}]"
        )
    check_softmax_options("lean_decode", q, softcap, sinks, out_dtype)
    if backend is not None and choose_backend(backend, kv.device) != plan.backend:
        plan = plan_decode(kv, plan.num_heads, window=plan.window, q_positions=plan.q_positions, backend=backend)
    scale = kv.head_dim**-0.5 if scale is None else float(scale)
    if plan.backend == "triton":
        assert plan.stream_k is not None
        tensors, numbers = _flatten(plan.stream_k)
        positions = plan.q_positions
    else:
        assert plan.tiles is not None
        tensors, numbers, positions = [plan.tiles.pages, plan.tiles.positions, plan.tiles.table], [], None
    out, lse = _decode(
        q, kv.k, kv.v, kv.page_table, kv.lengths, kv.page_positions, kv.k_scale, kv.v_scale, positions,
        tensors, numbers, sinks, scale, plan.window, softcap, out_dtype, plan.backend,
    )  # fmt: skip
    return AttentionState(out, lse)


def _empty_states(q, k, v, page_table, lengths, page_positions, k_scale, v_scale, q_positions, plan_tensors,
                  plan_numbers, sinks, scale, window, softcap, out_dtype, backend):  # fmt: skip
    return q.new_empty(q.shape, dtype=out_dtype), q.new_empty(q.shape[:2], dtype=torch.float32)


# The plan's scratch memory is written, but a launch leaves nothing there that another one reads: it is no result.
@operator("lean_attention::decode", fake=_empty_states)
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page_positions: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    q_positions: Tensor | None,
    plan_tensors: list[Tensor],
    plan_numbers: list[int],
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # torch.library knows tensors and numbers, not dataclasses: both arguments are put together again here.
    kv = PagedKV(k, v, page_table, lengths, page_positions, k_scale, v_scale)
    if backend == "triton":
        from lean_attention import stream_k

        plan = _unflatten(stream_k.StreamKPlan, plan_tensors, plan_numbers)
        state = stream_k.decode(
            q, kv, plan,
            scale=scale, window=window, softcap=softcap, sinks=sinks, out_dtype=out_dtype, q_positions=q_positions,
        )  # fmt: skip
    else:
        plan = KvTiles(*plan_tensors)
        state = portable.decode(q, kv, plan, scale=scale, softcap=softcap, sinks=sinks, out_dtype=out_dtype)
    return state.out, state.lse


def _flatten(plan: "StreamKPlan") -> tuple[list[Tensor], list[int]]:
    """A plan's fields, in order, as the tensors and the numbers among them."""
    values = [getattr(plan, field.name) for field in dataclasses.fields(plan)]
    return [x for x in values if isinstance(x, Tensor)], [x for x in values if not isinstance(x, Tensor)]


def _unflatten(plan_type: "type[StreamKPlan]", tensors: list[Tensor], numbers: list[int]) -> "StreamKPlan":
    """The inverse of `_flatten`: a field is a tensor where its annotation says so."""
    rest_tensors, rest_numbers = iter(tensors), iter(numbers)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(plan_type):
        fields[field.name] = next(rest_tensors if "Tensor" in str(field.type) else rest_numbers)
    return plan_type(**fields)


def check_window(operator: str, window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(
            f"{operator} got window {window}; needed: at least 1 (the query's own position), or None for all"
        )


def check_softmax_options(
    operator: str, q: Tensor, softcap: float | None, sinks: Tensor | None, out_dtype: torch.dtype
) -> None:
    """Raise ValueError unless softcap, sinks and out_dtype fit queries q [*, H, D]."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{operator} got softcap {softcap}; needed: a positive number, or None for no cap")
    if sinks is not None:
        if sinks.dtype != torch.float32 or tuple(sinks.shape) != (q.shape[1],) or sinks.device != q.device:
            raise ValueError(
                f"{operator} got sinks {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}; needed: float32 "
                f"[{q.shape[1]}] on {q.device}"
            )
        refuse_gradients(operator, sinks)
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"{operator} got out_dtype {out_dtype}; allowed: {', '.join(map(str, OUT_DTYPES))}")
