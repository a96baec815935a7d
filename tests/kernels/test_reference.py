"""The reference against PyTorch's own attention in float64, on dense keys."""

import pytest
import torch

from closeness import assert_close
from lean_attention import PagedKV, plan_decode, reference
from paged_cache import page_out, random_contexts


@pytest.mark.parametrize("window", [None, 7])
def test_prefill_is_causal_attention(window, generator):
    contexts = random_contexts([37], 2, 16, generator)
    kv = page_out(contexts, 16, generator)
    q = torch.randn(37, 6, 16, generator=generator)
    k, v = (x[0].double().transpose(0, 1).repeat_interleave(3, dim=0) for x in (contexts.keys, contexts.values))
    distance = torch.arange(37)[:, None] - torch.arange(37)
    seen = (distance >= 0) & (distance < (window or 37))
    dense = torch.nn.functional.scaled_dot_product_attention(q.double().transpose(0, 1), k, v, attn_mask=seen)
    offsets, positions = torch.tensor([0, 37]).int(), torch.arange(37).int()
    state = reference.lean_prefill(q, kv, offsets, positions, window=window)
    assert_close(state.out, dense.transpose(0, 1), 1e-6)
    logits = (q.double().transpose(0, 1) @ k.transpose(1, 2) / 4).masked_fill(~seen, float("-inf"))
    assert_close(state.lse, torch.logsumexp(logits, dim=-1).T, 1e-6)


def test_decode_is_the_last_row_of_prefill(generator):
    kv = page_out(random_contexts([37, 5], 2, 16, generator), 16, generator)
    q = torch.randn(2, 6, 16, generator=generator)
    sinks = torch.randn(6, generator=generator)
    decoded = reference.lean_decode(q, kv, plan_decode(kv, 6, window=4), softcap=3.0, sinks=sinks)
    offsets, positions = torch.tensor([0, 1, 2]).int(), torch.tensor([36, 4]).int()
    prefilled = reference.lean_prefill(q, kv, offsets, positions, window=4, softcap=3.0, sinks=sinks)
    assert torch.equal(decoded.out, prefilled.out)
    assert torch.equal(decoded.lse, prefilled.lse)


def test_a_sink_takes_weight_and_gives_no_value():
    k, v = torch.zeros(1, 1, 3, 16), torch.ones(1, 1, 3, 16)
    kv = PagedKV.from_contiguous(k, v, torch.tensor([3], dtype=torch.int32))
    state = reference.lean_decode(torch.zeros(1, 1, 16), kv, plan_decode(kv, 1), sinks=torch.zeros(1))
    assert_close(state.out, torch.full((1, 1, 16), 3 / 4), 1e-7)
    assert_close(state.lse, torch.tensor([[4.0]]).log(), 1e-6)
