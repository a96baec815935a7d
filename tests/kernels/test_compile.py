"""The operators inside torch.compile: one graph, no break."""

import torch

from closeness import assert_close
from lean_attention import append_kv, lean_decode, lean_prefill, merge_states, plan_decode
from paged_cache import page_out, random_contexts


def test_operators_survive_a_full_graph(target, generator):
    kv = page_out(random_contexts([20, 3], 2, 64, generator), 16, generator, device=target.device)
    q = torch.randn(2, 4, 64, generator=generator).to(target.device)
    new = torch.randn(2, 2, 64, generator=generator).to(target.device)
    pages = kv.page_table[torch.arange(2), (kv.lengths - 1).long() // 16]
    slots = (kv.lengths - 1) % 16
    offsets = torch.arange(3, dtype=torch.int32, device=target.device)
    plan = plan_decode(kv, 4, backend=target.backend)

    def layer(q, new, kv, plan):
        append_kv(new, new + 1, kv, pages, slots, backend=target.backend)
        decoded = lean_decode(q * 2, kv, plan)
        prefilled = lean_prefill(q * 2, kv, offsets, kv.lengths - 1, backend=target.backend)
        outs, lses = torch.stack((decoded.out, prefilled.out)), torch.stack((decoded.lse, prefilled.lse))
        return merge_states(outs, lses, backend=target.backend).out + 1

    with torch.inference_mode():
        eager = layer(q, new, kv, plan)
        written = kv.k.clone()
        append_kv(new * 0, new * 0, kv, pages, slots, backend=target.backend)
        torch.compiler.reset()
        # aot_eager traces, functionalises and checks the fake implementations; inductor would only add a C++ compiler.
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, new, kv, plan)
    assert_close(compiled, eager, 1e-6)
    assert torch.equal(kv.k.nan_to_num(), written.nan_to_num()), "append_kv inside the graph did not reach the pool"
