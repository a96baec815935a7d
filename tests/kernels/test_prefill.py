"""lean_prefill against the float64 reference, through the public face."""

import pytest
import torch

from closeness import assert_close
from lean_attention import PagedKV, lean_prefill, merge_states, reference
from lean_attention import kv_tiles as kv_tiles_module
from lean_attention import portable as portable_module
from paged_cache import Contexts, page_out, random_contexts
from pairwise import pairwise_cases

FP8 = torch.float8_e4m3fn

# For each sequence: its length, and how many of its last tokens are queries. `T` is the page size.
SHAPES = {
    "edges": lambda T: [(1, 1), (T - 1, T - 1), (T, 1), (T + 1, 2), (0, 0)],
    "whole": lambda T: [(40, 40), (T + 9, 26)],
    "chunk": lambda T: [(2 * T + 40, 37)],
    "idle": lambda T: [(5, 0), (30, 17), (9, 0)],
}
CASES = pairwise_cases(
    {
        "group": [1, 3, 4, 7, 8, 16, 32],
        "head_dim": [64, 80, 96, 128, 192, 256],
        "shape": list(SHAPES),
        "dtype": [torch.float32, torch.bfloat16, torch.float16, FP8],
        "shards": [1, 2, 3, 4],
        "window": [None, 1, 20, 10_000],
        "page_tokens": [16, 64, 128],
        "softcap": [None, 4.0],
        "sinks": [False, True],
        "layout": ["HND", "NHD"],
    }
)


def queries_of(contexts: Contexts, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """q_offsets and q_positions where the last `counts` tokens of each sequence are the queries."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    positions = [torch.arange(n - count, n) for n, count in zip(contexts.lengths.tolist(), counts, strict=True)]
    return offsets, torch.cat(positions).int()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v).removeprefix("torch.") for v in case.values()))
def test_prefill_matches_the_reference(case, target, generator):
    kv_heads = 1 if case["group"] > 8 else 2
    H, D, T = kv_heads * case["group"], case["head_dim"], case["page_tokens"]
    scales = (0.5, 2.0) if case["dtype"] == FP8 else None
    dtype = torch.bfloat16 if case["dtype"] == FP8 else case["dtype"]
    lengths, counts = zip(*SHAPES[case["shape"]](T), strict=True)
    contexts = random_contexts(lengths, kv_heads, D, generator)
    q_offsets, q_positions = queries_of(contexts, list(counts))
    q = torch.randn(int(q_offsets[-1]), H, D, generator=generator).to(dtype)
    sinks = torch.randn(H, generator=generator) if case["sinks"] else None
    options = {"window": case["window"], "softcap": case["softcap"]}

    states = []
    for shard in range(case["shards"]):
        kv = page_out(
            contexts, T, generator, shard=shard, shards=case["shards"], dtype=case["dtype"], device=target.device,
            layout=case["layout"], shuffled=True, scales=scales,
        )  # fmt: skip
        on_device = [x.to(target.device) for x in (q, q_offsets, q_positions)]
        mine = None if sinks is None or shard else sinks.to(target.device)
        state = lean_prefill(on_device[0], kv, *on_device[1:], sinks=mine, backend=target.backend, **options)
        states.append(state)
    outs, lses = (torch.stack(parts) for parts in zip(*states, strict=True))
    actual = merge_states(outs, lses, backend=target.backend)

    whole = page_out(contexts, T, generator, dtype=case["dtype"], scales=scales)
    expected = reference.lean_prefill(q, whole, q_offsets, q_positions, sinks=sinks, **options)
    assert_close(actual.out, expected.out, dtype)
    assert_close(actual.lse, expected.lse, dtype)


def test_queries_need_not_be_in_order(target, generator):
    """Chunks gathered from several shards may arrive in any order; positions alone decide what is seen."""
    contexts = random_contexts([90], 2, 64, generator)
    kv = page_out(contexts, 16, generator, device=target.device)
    order = torch.randperm(50, generator=generator)
    q = torch.randn(50, 4, 64, generator=generator)
    offsets, positions = queries_of(contexts, [50])
    straight = reference.lean_prefill(q.to(target.device), kv, offsets, positions)
    state = lean_prefill(
        q[order].to(target.device), kv, offsets.to(target.device), positions[order].to(target.device),
        backend=target.backend,
    )  # fmt: skip
    assert_close(state.out, straight.out[order.to(target.device)], torch.float32)


@pytest.mark.parametrize("window", [None, 100])
def test_blocks_of_queries_and_tiles_of_keys(window, generator, monkeypatch):
    """The portable path walks blocks: move their sizes across the sequence, and list pages out of order."""
    contexts = random_contexts([300, 40], 2, 32, generator)
    kv = page_out(contexts, 16, generator, shards=1)
    order = [*range(9, 18), *range(9), 18]
    table, positions = kv.page_table.clone(), torch.arange(kv.page_table.shape[1]).int().repeat(2, 1) * 16
    table[0, :19], positions[0, :19] = table[0, order], positions[0, order]
    ring = PagedKV(kv.k, kv.v, table, kv.lengths, page_positions=positions)
    q = torch.randn(260, 4, 32, generator=generator)
    q_offsets, q_positions = queries_of(contexts, [230, 30])
    expected = reference.lean_prefill(q, kv, q_offsets, q_positions, window=window)
    for tile_tokens, score_elements in ((16, 1), (70, 70 * 11), (1024, 1 << 20)):
        monkeypatch.setattr(kv_tiles_module, "LONG_TILE_ELEMENTS", tile_tokens * 64)
        monkeypatch.setattr(portable_module, "SCORE_ELEMENTS", score_elements)
        for cache in (kv, ring):
            actual = lean_prefill(q, cache, q_offsets, q_positions, window=window)
            assert_close(actual.out, expected.out, torch.float32)
            assert_close(actual.lse, expected.lse, torch.float32)


@pytest.mark.parametrize("window", [None, 7])
def test_a_shard_of_one_page_that_lies_anywhere(window, target, generator):
    """A rank's whole share of a short sequence: one page, whose position is given."""
    contexts = random_contexts([9, 0, 16], 2, 32, generator)
    kv = page_out(contexts, 16, generator, device=target.device)
    positions = torch.tensor([[32], [0], [16]], dtype=torch.int32, device=target.device)
    shard = PagedKV(kv.k, kv.v, kv.page_table[:, :1].contiguous(), kv.lengths, page_positions=positions)
    q = torch.randn(8, 4, 32, generator=generator).to(target.device)
    offsets = torch.tensor([0, 5, 6, 8], dtype=torch.int32, device=target.device)
    q_positions = torch.tensor([31, 32, 36, 40, 45, 3, 20, 35], dtype=torch.int32, device=target.device)
    expected = reference.lean_prefill(q, shard, offsets, q_positions, window=window)
    state = lean_prefill(q, shard, offsets, q_positions, window=window, backend=target.backend)
    assert_close(state.out, expected.out, torch.float32)
    assert_close(state.lse, expected.lse, torch.float32)


def test_one_query_a_sequence_is_decode(target, generator):
    contexts = random_contexts([33, 1, 16], 2, 64, generator)
    kv = page_out(contexts, 16, generator, device=target.device)
    q = torch.randn(3, 6, 64, generator=generator).to(target.device)
    offsets = torch.arange(4, dtype=torch.int32, device=target.device)
    state = lean_prefill(q, kv, offsets, kv.lengths - 1, out_dtype=torch.bfloat16, backend=target.backend)
    assert state.out.dtype == torch.bfloat16
    expected = reference.lean_prefill(q, kv, offsets, kv.lengths - 1)
    assert_close(state.out, expected.out, torch.bfloat16)
    assert_close(state.lse, expected.lse, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_offsets": torch.tensor([0, 4])}, r"int32 \[3\]"),
        ({"q_offsets": torch.tensor([0, 3, 9], dtype=torch.int32)}, "from 0 to 4, never falling"),
        ({"q_offsets": torch.tensor([0, 5, 4], dtype=torch.int32)}, "from 0 to 4, never falling"),
        ({"q_positions": torch.zeros(3, dtype=torch.int32)}, r"int32 \[4\]"),
        ({"window": 0}, "at least 1"),
        ({"softcap": -1.0}, "positive"),
        ({"q": torch.zeros(4, 2, 64, requires_grad=True)}, "requires grad"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, generator):
    kv = page_out(random_contexts([20, 4], 2, 64, generator), 16, generator)
    arguments = {
        "q": torch.zeros(4, 2, 64),
        "q_offsets": torch.tensor([0, 3, 4], dtype=torch.int32),
        "q_positions": torch.tensor([17, 18, 19, 3], dtype=torch.int32),
    } | change
    q = arguments.pop("q")
    with pytest.raises(ValueError, match=message):
        lean_prefill(q, kv, **arguments, backend="portable")


LONG = 70_000
"""Query tokens, each a block of its own: more than the second dimension of a grid holds."""


def test_a_long_prompt_fits_into_one_grid(monkeypatch):
    flash_prefill = pytest.importorskip("lean_attention.flash_prefill")
    grids = []

    class Launches:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(flash_prefill, "prefill_kernel", Launches())
    pool, none = torch.zeros(1, 2, 16, 16), torch.zeros(1, dtype=torch.int32)
    q = torch.zeros(LONG, 2, 16)
    offsets, positions = torch.tensor([0, LONG], dtype=torch.int32), torch.zeros(LONG, dtype=torch.int32)
    tuning = flash_prefill.PrefillTuning(rows=1, tile=16, num_warps=4, num_stages=1)
    flash_prefill.prefill(q, PagedKV(pool, pool, none[None], none), offsets, positions, scale=1.0, tuning=tuning)
    assert grids == [(2 * (LONG + 1),)]


@pytest.mark.gpu
def test_a_long_prompt_is_attended_to(generator):
    q = torch.randn(1, 128, 16, generator=generator).expand(LONG, -1, -1).cuda()  # a token fills a block of rows
    k, v = torch.randn(2, 1, 1, 16, 16, generator=generator).cuda()
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    offsets = torch.tensor([0, LONG], dtype=torch.int32, device="cuda")
    positions = torch.full((LONG,), 15, dtype=torch.int32, device="cuda")
    out, lse = lean_prefill(q, PagedKV(k, v, 0 * one[None], 16 * one), offsets, positions, backend="triton")
    assert torch.equal(out, out[:1].expand_as(out))
    assert torch.equal(lse, lse[:1].expand_as(lse))
    weights = torch.softmax(q[0].double() @ k[0, 0].double().T / 4, -1)
    torch.testing.assert_close(out[0].double(), weights @ v[0, 0].double(), rtol=1e-4, atol=1e-4)
