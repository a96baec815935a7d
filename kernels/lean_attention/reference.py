"""A slow, exact twin of every public operator: float64 inside, one query and one head at a time, no Triton.

It takes the same arguments as the operators and shares no arithmetic with them; the tests and the benchmark's gate
compare against it.

Shapes: N states or keys, B sequences, H query heads, K KV heads, D head dim, T tokens of a page.
"""

import torch
from torch import Tensor

from lean_attention.decode import DecodePlan
from lean_attention.paged_kv import PagedKV
from lean_attention.state import AttentionState


def lean_decode(
    q: Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: None = None,
) -> AttentionState:
    """`lean_attention.lean_decode`, exactly. Reads only `window` and `q_positions` of the plan."""
    state = AttentionState.identity(q.shape, dtype=torch.float64)
    for b in range(kv.num_sequences):
        keys, values, positions = keys_of(kv, b)
        q_position = int(kv.lengths[b]) - 1 if plan.q_positions is None else int(plan.q_positions[b])
        seen = torch.ones_like(positions, dtype=torch.bool)
        if plan.window is not None:
            seen = positions > q_position - plan.window
        state.out[b], state.lse[b] = _attend(q[b], keys, values, seen, scale, softcap, sinks)
    return AttentionState(state.out.to(q.device, out_dtype), state.lse.to(q.device))


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
    backend: None = None,
) -> AttentionState:
    """`lean_attention.lean_prefill`, exactly."""
    state = AttentionState.identity(q.shape, dtype=torch.float64)
    offsets = q_offsets.tolist()
    for b in range(kv.num_sequences):
        keys, values, positions = keys_of(kv, b)
        for i in range(offsets[b], offsets[b + 1]):
            q_position = int(q_positions[i])
            seen = positions <= q_position
            if window is not None:
                seen &= positions > q_position - window
            state.out[i], state.lse[i] = _attend(q[i], keys, values, seen, scale, softcap, sinks)
    return AttentionState(state.out.to(q.device, out_dtype), state.lse.to(q.device))


def merge_states(out_NBHD: Tensor, lse_NBH: Tensor, *, backend: None = None) -> AttentionState:
    """`lean_attention.merge_states`, exactly: the formula of state.py, one query at a time."""
    _, B, H, _ = out_NBHD.shape
    state = AttentionState.identity(out_NBHD.shape[1:], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            seen = lse_NBH[:, b, h] > float("-inf")
            if not seen.any():
                continue
            weights = lse_NBH[seen, b, h].double().cpu()
            lse = torch.logsumexp(weights, dim=0)
            state.out[b, h] = torch.exp(weights - lse) @ out_NBHD[seen, b, h].double().cpu()
            state.lse[b, h] = lse
    return AttentionState(state.out.to(out_NBHD.device, out_NBHD.dtype), state.lse.to(out_NBHD.device))


def keys_of(kv: PagedKV, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence b's keys [K, N, D] and values [K, N, D] in float64, and their absolute positions [N]; on the CPU."""
    length, T = int(kv.lengths[b]), kv.page_tokens
    keys = torch.empty(kv.num_kv_heads, length, kv.head_dim, dtype=torch.float64)
    values = torch.empty_like(keys)
    positions = torch.empty(length, dtype=torch.int64)
    for j, start in enumerate(range(0, length, T)):
        stop = min(start + T, length)
        page = int(kv.page_table[b, j])
        keys[:, start:stop] = kv.k[page, :, : stop - start]
        values[:, start:stop] = kv.v[page, :, : stop - start]
        first = start if kv.page_positions is None else int(kv.page_positions[b, j])
        positions[start:stop] = torch.arange(first, first + stop - start)
    if kv.k_scale is not None:
        keys *= kv.k_scale.double().cpu()
    if kv.v_scale is not None:
        values *= kv.v_scale.double().cpu()
    return keys, values, positions


def _attend(
    q_HD: Tensor,
    keys_KND: Tensor,
    values_KND: Tensor,
    seen_N: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One query token, head by head: (out [H, D], lse [H]) over the keys it sees."""
    (H, D), K = q_HD.shape, keys_KND.shape[0]
    out, lse = torch.zeros(H, D, dtype=torch.float64), torch.full((H,), float("-inf"), dtype=torch.float64)
    for h in range(H):
        logits = keys_KND[h // (H // K)] @ q_HD[h].double().cpu() * (D**-0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits[~seen_N] = float("-inf")
        values = values_KND[h // (H // K)]
        if sinks_H is not None:
            # A sink is a key whose value is zero.
            logits = torch.cat((logits, sinks_H[h].double().cpu().reshape(1)))
            values = torch.cat((values, values.new_zeros(1, D)))
        if (logits > float("-inf")).any():
            lse[h] = torch.logsumexp(logits, dim=0)
            out[h] = torch.exp(logits - lse[h]) @ values
    return out, lse
