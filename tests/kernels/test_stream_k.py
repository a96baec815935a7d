"""The stream-K plan on the device against its specification, and the reduction's corners. Needs Triton: on a GPU, or
on the CPU under TRITON_INTERPRET=1 (test_interpreted.py runs it so)."""

import dataclasses

import pytest
import torch

from closeness import assert_close
from lean_attention import PagedKV, plan_decode, reference
from lean_attention.schedule import Schedule, visible_tokens
from paged_cache import page_out, random_contexts


@pytest.fixture
def device(target) -> str:
    if target.backend != "triton":
        pytest.skip("about the Triton kernels")
    return target.device


def tuning(tile: int = 32, *, fan_in: int = 32, min_tiles: int = 1):
    from lean_attention.tuning import DecodeTuning

    return DecodeTuning(tile, num_warps=4, num_stages=2, ctas_per_sm=1, min_tiles=min_tiles, fan_in=fan_in)


@pytest.mark.parametrize("num_ctas", [1, 5, 300])
@pytest.mark.parametrize("window", [None, 40, 1])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_device_plan_is_the_schedule(num_ctas, window, shards, device, generator):
    from lean_attention.stream_k import plan_stream_k

    lengths = [0, 1, 31, 32, 0, 33, 700, 0]
    contexts = random_contexts(lengths, 2, 16, generator)
    kv = page_out(contexts, 16, generator, shard=shards - 1, shards=shards, device=device)
    if shards == 1:
        kv = dataclasses.replace(kv, page_positions=None)
    q_positions = contexts.lengths - 1
    plan = plan_stream_k(
        kv, 6, window=window, q_positions=q_positions.to(device), num_ctas=num_ctas, tuning=tuning(min_tiles=2)
    )
    visible = tuple(
        visible_tokens(
            int(kv.lengths[b]), window, int(q_positions[b]),
            None if kv.page_positions is None else kv.page_positions[b].tolist(), 16,
        )
        for b in range(len(lengths))
    )  # fmt: skip
    schedule = Schedule(visible, 32, 2, num_ctas, min_tiles=2)

    before = [sum(schedule.tiles[:b]) for b in range(len(lengths) + 1)]
    assert plan.tiles_before.tolist() == before
    assert [
        first
        for first, tiles in zip(plan.first_tile.tolist(), schedule.tiles, strict=True)
        if tiles
    ] == [first for first, tiles in zip(schedule.first_tile, schedule.tiles, strict=True) if tiles]  # fmt: skip
    assert int(plan.total_tiles) == schedule.total
    assert int(plan.active_ctas) == schedule.active_ctas
    assert plan.empty_sequences[: len(schedule.empty)].tolist() == list(schedule.empty)
    assert int(plan.work[2]) == len(schedule.empty)
    assert not plan.counters.any()
    if schedule.total:
        starts = [schedule.pieces(cta)[0].sequence for cta in range(schedule.active_ctas)]
        assert plan.first_sequence[: schedule.active_ctas].tolist() == starts


@pytest.mark.parametrize(
    ("num_ctas", "fixed_split", "fan_in"), [(1, None, 2), (11, None, 2), (23, None, 4), (None, 1, 2), (None, 5, 2)]
)
def test_every_reduction_gives_the_same_attention(num_ctas, fixed_split, fan_in, device, generator):
    from lean_attention import stream_k

    contexts = random_contexts([0, 5, 700, 64], 1, 16, generator)
    kv = page_out(contexts, 16, generator, device=device)
    q = torch.randn(4, 3, 16, generator=generator).to(device)
    plan = stream_k.plan_stream_k(kv, 3, num_ctas=num_ctas, fixed_split=fixed_split, tuning=tuning(fan_in=fan_in))
    expected = reference.lean_decode(q, kv, plan_decode(kv, 3, backend="portable"))
    states = [stream_k.decode(q, kv, plan, scale=16**-0.5) for _ in range(2)]
    for state in states:
        assert_close(state.out, expected.out, torch.float32)
        assert_close(state.lse, expected.lse, torch.float32)
    # The counters are back at zero, and the pieces are summed in the same order whoever sums them.
    assert not plan.counters.any()
    assert torch.equal(states[0].out, states[1].out)
    assert torch.equal(states[0].lse, states[1].lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_that_left_the_window_may_be_recycled_or_unlisted(dtype, device, generator):
    from lean_attention import stream_k

    contexts = random_contexts([81], 1, 32, generator)
    kv = page_out(contexts, 16, generator, dtype=dtype, device=device)
    expected = reference.lean_decode(
        q := torch.randn(1, 2, 32, generator=generator).to(device, dtype), kv,
        plan_decode(kv, 2, window=40, q_positions=kv.lengths - 1, backend="portable"),
    )  # fmt: skip
    # Tokens 0 to 41 are out of sight: page 0 is gone, page 1 has been given away and holds NaN.
    table = kv.page_table.clone()
    kv.k[table[0, 1]] = kv.v[table[0, 1]] = float("nan")
    table[0, 0] = -1
    kv = dataclasses.replace(kv, page_table=table)
    plan = stream_k.plan_stream_k(kv, 2, window=40, q_positions=kv.lengths - 1, num_ctas=2, tuning=tuning(64))
    actual = stream_k.decode(q, kv, plan, scale=32**-0.5, window=40, q_positions=kv.lengths - 1)
    assert_close(actual.out, expected.out, dtype)
    assert_close(actual.lse, expected.lse, dtype)


def test_what_a_plan_does_not_fit_is_refused(device, generator):
    from lean_attention import stream_k

    kv = page_out(random_contexts([40], 2, 16, generator), 16, generator, device=device)
    plan = stream_k.plan_stream_k(kv, 4, num_ctas=2)
    with pytest.raises(ValueError, match="make a plan for each shape"):
        stream_k.decode(torch.zeros(1, 8, 16, device=device), kv, plan, scale=1.0)
    wide = torch.zeros(1, 1, 16, 320, device=device)
    with pytest.raises(ValueError, match="up to 256"):
        stream_k.plan_stream_k(PagedKV(wide, wide, kv.page_table, kv.lengths), 1)
