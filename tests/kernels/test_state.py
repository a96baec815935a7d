"""The algebra of states: disjoint parts merge to the whole, however they were cut and in whatever order they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from closeness import assert_close
from lean_attention import AttentionState, PagedKV, lean_decode, merge_states, plan_decode, reference


def state_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionState:
    """The state of one query over keys k and values v [1, K, S, D], of which there may be none."""
    spare = torch.full_like(q[:, : k.shape[1], None], float("nan"))
    k_room, v_room = (torch.cat((x, spare), dim=2) for x in (k, v))
    kv = PagedKV.from_contiguous(k_room, v_room, torch.tensor([k.shape[2]], dtype=torch.int32))
    return lean_decode(q, kv, plan_decode(kv, q.shape[1], backend="portable"))


@settings(max_examples=40)
@given(data=st.data())
def test_random_splits_merge_to_the_whole_in_any_order(data):
    tokens = data.draw(st.integers(1, 60), label="tokens")
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=6), label="cuts"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    k, v = (torch.randn(1, 2, tokens, 16, generator=generator) for _ in range(2))
    q = torch.randn(1, 6, 16, generator=generator) * data.draw(st.sampled_from([0.1, 1.0, 20.0]), label="sharpness")
    whole = state_of(q, k, v)
    bounds = list(zip([0, *cuts], [*cuts, tokens], strict=True))
    order = data.draw(st.permutations(range(len(bounds))), label="order")
    parts = [state_of(q, k[:, :, a:b], v[:, :, a:b]) for a, b in (bounds[i] for i in order)]

    at_once = merge_states(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]))
    one_by_one = AttentionState.identity(q.shape)
    for part in parts:
        one_by_one = one_by_one.merge(part)
    as_a_tree = list(parts)
    while len(as_a_tree) > 1:
        i = data.draw(st.integers(0, len(as_a_tree) - 2), label="pair")
        as_a_tree[i : i + 2] = [as_a_tree[i + 1].merge(as_a_tree[i])]
    for merged in (at_once, one_by_one, as_a_tree[0]):
        assert_close(merged.out, whole.out, torch.float32)
        # A sharp query has logits up to about 250, of which float32 keeps 1.5e-5.
        assert_close(merged.lse, whole.lse, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 4, 64), (2, 1, 7, 80), (8, 5, 3, 128), (33, 2, 2, 256)])
def test_merge_matches_the_reference(shape, dtype, target, generator):
    out = torch.randn(shape, generator=generator).to(dtype)
    lse = torch.randn(shape[:3], generator=generator) * 5
    lse[torch.rand(shape[:3], generator=generator) < 0.3] = float("-inf")
    lse[:, 0, 0] = float("-inf")
    out[lse == float("-inf")] = float("nan")
    expected = reference.merge_states(out, lse)
    actual = merge_states(out.to(target.device), lse.to(target.device), backend=target.backend)
    assert actual.out.dtype == dtype
    assert (actual.out[0, 0] == 0).all()
    assert_close(actual.out, expected.out, dtype)
    assert_close(actual.lse, expected.lse, torch.float32)


def test_the_identity_changes_nothing_on_either_side():
    state = AttentionState(torch.randn(2, 3, 8), torch.randn(2, 3))
    nothing = AttentionState.identity((2, 3, 8))
    for merged in (state.merge(nothing), nothing.merge(state)):
        assert_close(merged.out, state.out, 1e-7)
        assert_close(merged.lse, state.lse, 1e-6)
    still_nothing = nothing.merge(nothing)
    assert torch.equal(still_nothing.out, nothing.out)
    assert torch.equal(still_nothing.lse, nothing.lse)


@pytest.mark.parametrize(
    ("out", "lse", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), r"\[N, B, H, D\]"),
        (torch.zeros(0, 1, 3, 4), torch.zeros(0, 1, 3), "N at least 1"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 2), r"\[N, B, H\]"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3).double(), "lse float32"),
        (torch.zeros(2, 1, 3, 4).double(), torch.zeros(2, 1, 3), "allowed: out float32"),
        (torch.zeros(2, 1, 3, 4, requires_grad=True), torch.zeros(2, 1, 3), "requires grad"),
    ],
)
def test_what_is_no_stack_of_states_is_refused(out, lse, message):
    with pytest.raises(ValueError, match=message):
        merge_states(out, lse)
