"""LeanAttention: exact attention over a paged KV cache, as states that merge.

    from lean_attention import PagedKV, lean_decode, plan_decode

    kv = PagedKV(k, v, page_table, lengths)
    plan = plan_decode(kv, num_heads)             # once per step
    state = lean_decode(q, kv, plan)              # per layer: state.out, state.lse

Triton on GPUs, PyTorch elsewhere. The library knows nothing of ranks, models or servers: a shard of a longer context
is a PagedKV with its own pages and their positions. See kernels/README.md.
"""

from lean_attention import reference
from lean_attention.backend import Backend
from lean_attention.decode import DecodePlan, lean_decode, plan_decode
from lean_attention.paged_kv import PagedKV, append_kv
from lean_attention.prefill import lean_prefill
from lean_attention.state import AttentionState, merge_states

__all__ = [
    "AttentionState",
    "Backend",
    "DecodePlan",
    "PagedKV",
    "append_kv",
    "lean_decode",
    "lean_prefill",
    "merge_states",
    "plan_decode",
    "reference",
]
