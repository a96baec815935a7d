"""lean_decode against the float64 reference, through the public face."""

import pytest
import torch

from closeness import LSE_TOLERANCE, assert_close
from lean_attention import AttentionState, PagedKV, lean_decode, merge_states, plan_decode, reference
from lean_attention import kv_tiles as kv_tiles_module
from lean_attention.kv_tiles import TileReader
from lean_attention.tile_attention import native_dtype
from paged_cache import Contexts, page_out, random_contexts
from pairwise import pairwise_cases

FP8 = torch.float8_e4m3fn

# Page counts that sit on every edge; `T` is filled in.
LENGTHS = {
    "edges": lambda T: [0, 1, T - 1, T, T + 1],
    "outlier": lambda T: [2, 50 * T, 1],
    "even": lambda T: [2 * T + 3] * 3,
    "empty": lambda T: [0, 0],
    "one": lambda T: [5 * T - 1],
}
CASES = pairwise_cases(
    {
        "group": [1, 3, 4, 5, 7, 8, 16, 32],
        "head_dim": [64, 80, 96, 128, 192, 256],
        "lengths": list(LENGTHS),
        "num_ctas": [None, 1, 2, 7, 45],
        "dtype": [torch.float32, torch.bfloat16, torch.float16, FP8],
        "shards": [1, 2, 3, 4],
        "window": [None, 1, 70, 10_000],
        "page_tokens": [16, 64, 128],
        "softcap": [None, 4.0],
        "sinks": [False, True],
        "layout": ["HND", "NHD"],
        "shuffled": [True, False],
    }
)


def name_of(case: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def decode_shards(q, contexts: Contexts, case: dict, target, generator, **options) -> AttentionState:
    """Decode on each shard with its own pages, then merge; the sinks join on the last shard only."""
    states = []
    for shard in range(case["shards"]):
        kv = page_out(
            contexts, case["page_tokens"], generator, shard=shard, shards=case["shards"], dtype=case["dtype"],
            device=target.device, layout=case["layout"], shuffled=case["shuffled"], scales=case.get("scales"),
        )  # fmt: skip
        q_positions = (contexts.lengths - 1).to(target.device)
        plan = plan_decode(
            kv, q.shape[1], window=case["window"], q_positions=q_positions, num_ctas=case["num_ctas"],
            backend=target.backend,
        )  # fmt: skip
        sinks = options["sinks"] if shard == case["shards"] - 1 else None
        states.append(lean_decode(q, kv, plan, softcap=options["softcap"], sinks=sinks))
    outs, lses = (torch.stack(parts) for parts in zip(*states, strict=True))
    return merge_states(outs, lses, backend=target.backend)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_decode_matches_the_reference(case, target, generator):
    kv_heads = 1 if case["group"] > 8 else 2
    H, D = kv_heads * case["group"], case["head_dim"]
    case = case | {"scales": (0.5, 2.0) if case["dtype"] == FP8 else None}
    dtype = torch.bfloat16 if case["dtype"] == FP8 else case["dtype"]
    contexts = random_contexts(LENGTHS[case["lengths"]](case["page_tokens"]), kv_heads, D, generator)
    q = torch.randn(len(contexts.keys), H, D, generator=generator).to(target.device, dtype)
    sinks = torch.randn(H, generator=generator).to(target.device) if case["sinks"] else None

    actual = decode_shards(q, contexts, case, target, generator, softcap=case["softcap"], sinks=sinks)

    whole = page_out(contexts, case["page_tokens"], generator, dtype=case["dtype"], scales=case["scales"])
    plan = plan_decode(whole, H, window=case["window"], backend="portable")
    expected = reference.lean_decode(
        q.cpu(), whole, plan, softcap=case["softcap"], sinks=None if sinks is None else sinks.cpu()
    )
    assert_close(actual.out, expected.out, dtype)
    assert_close(actual.lse, expected.lse, dtype)


def test_the_grid_meets_every_pair():
    assert {(c["group"], c["head_dim"]) for c in CASES} == {
        (g, d) for g in (1, 3, 4, 5, 7, 8, 16, 32) for d in (64, 80, 96, 128, 192, 256)
    }
    assert len(CASES) < 80


def test_no_sequences_at_all(target, generator):
    pool = torch.zeros(1, 2, 16, 64, device=target.device)
    none = torch.empty(0, dtype=torch.int32, device=target.device)
    kv = PagedKV(pool, pool, none.view(0, 1), none)
    state = lean_decode(torch.empty(0, 4, 64, device=target.device), kv, plan_decode(kv, 4, backend=target.backend))
    assert state.out.shape == (0, 4, 64)
    assert state.lse.shape == (0, 4)


def test_an_empty_sequence_is_the_identity_and_a_sink_alone_is_its_logit(target, generator):
    contexts = random_contexts([0, 3], 2, 64, generator)
    kv = page_out(contexts, 16, generator, device=target.device)
    q = torch.randn(2, 4, 64, generator=generator).to(target.device)
    plan = plan_decode(kv, 4, backend=target.backend)
    state = lean_decode(q, kv, plan)
    assert (state.out[0] == 0).all()
    assert (state.lse[0] == float("-inf")).all()
    sinks = torch.tensor([0.5, -2.0, 0.0, float("-inf")], device=target.device)
    state = lean_decode(q, kv, plan, sinks=sinks)
    assert (state.out[0] == 0).all()
    assert_close(state.lse[0], sinks, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unpaged_cache_of_either_layout_is_read_in_place(dtype, target, generator):
    lengths = torch.tensor([200, 0, 37], dtype=torch.int32, device=target.device)
    for layout in ("BKSD", "BSKD"):
        k, v = (torch.full((3, 2, 200, 64), float("nan")) for _ in range(2))
        if layout == "BSKD":
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        k, v = k.to(target.device, dtype), v.to(target.device, dtype)
        for b, n in enumerate(lengths.tolist()):
            k[b, :, :n] = torch.randn(2, n, 64, generator=generator)
            v[b, :, :n] = torch.randn(2, n, 64, generator=generator)
        kv = PagedKV.from_contiguous(k, v, lengths)
        assert kv.k.data_ptr() == k.data_ptr()
        q = torch.randn(3, 6, 64, generator=generator).to(target.device, dtype)
        plan = plan_decode(kv, 6, window=150, backend=target.backend)
        actual, expected = lean_decode(q, kv, plan), reference.lean_decode(q, kv, plan)
        assert_close(actual.out, expected.out, dtype)
        assert_close(actual.lse, expected.lse, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_tiles_smaller_than_pages_and_larger(layout, shuffled, dtype, generator, monkeypatch):
    """The portable path cuts sequences by size: move the size across the page, and let short sequences share reads."""
    contexts = random_contexts([0, 5, 130, 700, 64, 66, 1], 2, 32, generator)
    kv = page_out(contexts, 64, generator, dtype=dtype, layout=layout, shuffled=shuffled)
    before = kv.k.clone(), kv.v.clone()
    q = torch.randn(7, 6, 32, generator=generator).to(dtype)
    for window in (None, 100):
        expected = reference.lean_decode(q, kv, plan_decode(kv, 6, window=window, backend="portable"))
        for elements in (50 * 64, 64 * 64, 200 * 64, 1 << 20):
            monkeypatch.setattr(kv_tiles_module, "TILE_ELEMENTS", elements)
            monkeypatch.setattr(kv_tiles_module, "LONG_TILE_ELEMENTS", elements)
            plan = plan_decode(kv, 6, window=window, backend="portable")
            actual = lean_decode(q, kv, plan)
            assert_close(actual.out, expected.out, dtype)
            assert_close(actual.lse, expected.lse, LSE_TOLERANCE[dtype])
    for pool, unchanged in zip((kv.k, kv.v), before, strict=True):
        assert torch.equal(pool.nan_to_num(99.0), unchanged.nan_to_num(99.0)), "decode wrote into the cache"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_adjacent_pages_are_read_where_they_lie(layout, dtype, generator, monkeypatch):
    """Runs of whole pages, broken by a page elsewhere, by a page half full and by a window, and cut where too long."""
    monkeypatch.setattr(kv_tiles_module, "IN_PLACE_HEAD_ELEMENTS", 16 * 32)
    monkeypatch.setattr(kv_tiles_module, "IN_PLACE_ELEMENTS", 2 * 2 * 16 * 32)
    monkeypatch.setattr(kv_tiles_module, "LONG_TILE_ELEMENTS", 5 * 2 * 16 * 32)
    contexts = random_contexts([230, 0, 96, 16, 33], 2, 32, generator)
    kv = page_out(contexts, 16, generator, dtype=dtype, layout=layout, shuffled=False)
    kv.page_table[0, [3, 9]] = kv.page_table[0, [9, 3]]  # breaks one run; the keys are what the table says
    q = torch.randn(5, 6, 32, generator=generator).to(dtype)
    for window, softcap in ((None, None), (100, None), (None, 5.0)):
        plan = plan_decode(kv, 6, window=window, backend="portable")
        assert plan.tiles is not None
        runs = [tile for group in plan.tiles.groups() for _, tile in group if tile.in_place]
        if native_dtype(kv.k) == dtype:
            assert {run.sequence for run in runs} >= {0, 2, 4}
            assert max(run.num_pages for run in runs) == 5
        for run in runs:
            keys = TileReader(kv.k, plan.tiles, dtype).read([run])
            assert keys.data_ptr() == kv.k[run.page].data_ptr()
            assert keys.shape == (run.num_pages, 2, 16, 32)
        actual = lean_decode(q, kv, plan, softcap=softcap)
        expected = reference.lean_decode(q, kv, plan, softcap=softcap)
        assert_close(actual.out, expected.out, dtype)
        assert_close(actual.lse, expected.lse, LSE_TOLERANCE[dtype])


def test_short_sequences_share_reads_and_a_long_one_does_not_stretch_them(generator):
    contexts = random_contexts([20] * 31 + [40_000], 2, 32, generator)
    kv = page_out(contexts, 16, generator)
    tiles = plan_decode(kv, 4, backend="portable").tiles
    assert tiles is not None
    groups = tiles.groups()
    tokens_read = [len(group) * max(tile.num_pages for _, tile in group) * 16 for group in groups]
    assert sum(tokens_read) <= 40_000 + 16 + 31 * 32
    assert len(groups) <= 4


def test_the_window_counts_from_the_query_not_from_the_last_key(target, generator):
    contexts = random_contexts([100, 100], 1, 64, generator)
    kv = page_out(contexts, 16, generator, device=target.device)
    q = torch.randn(2, 2, 64, generator=generator).to(target.device)
    q_positions = torch.tensor([103, 150], dtype=torch.int32, device=target.device)
    plan = plan_decode(kv, 2, window=10, q_positions=q_positions, backend=target.backend)
    actual = lean_decode(q, kv, plan)
    last_six = PagedKV.from_contiguous(kv_tail(contexts, 6).to(target.device), kv_tail(contexts, 6, values=True).to(
        target.device), torch.tensor([6, 0], dtype=torch.int32, device=target.device))  # fmt: skip
    expected = reference.lean_decode(q, last_six, plan_decode(last_six, 2, backend=target.backend))
    assert_close(actual.out, expected.out, torch.float32)
    assert_close(actual.lse, expected.lse, torch.float32)


def kv_tail(contexts: Contexts, tokens: int, *, values: bool = False):
    dense = contexts.values if values else contexts.keys
    return torch.stack([x[-tokens:].transpose(0, 1) for x in dense])


def test_pages_may_be_listed_out_of_order(target, generator):
    """A ring of pages lists the oldest one anywhere; positions say which it is."""
    contexts = random_contexts([16 * 6], 2, 64, generator)
    kv = page_out(contexts, 16, generator, device=target.device)
    order = [4, 5, 0, 1, 2, 3]
    table = kv.page_table[:, order].contiguous()
    positions = torch.tensor([order], dtype=torch.int32, device=target.device) * 16
    ring = PagedKV(kv.k, kv.v, table, kv.lengths, page_positions=positions)
    q = torch.randn(1, 4, 64, generator=generator).to(target.device)
    q_positions = kv.lengths - 1
    for window in (None, 50):
        plan = plan_decode(ring, 4, window=window, q_positions=q_positions, backend=target.backend)
        straight = plan_decode(kv, 4, window=window, backend=target.backend)
        expected = reference.lean_decode(q, kv, straight)
        assert_close(lean_decode(q, ring, plan).out, expected.out, torch.float32)


def test_scale_out_dtype_and_strided_queries(target, generator):
    contexts = random_contexts([50, 3], 2, 64, generator)
    kv = page_out(contexts, 16, generator, device=target.device)
    q = torch.randn(2, 64, 4, generator=generator).to(target.device).transpose(1, 2)
    plan = plan_decode(kv, 4, backend=target.backend)
    expected = reference.lean_decode(q, kv, plan, scale=0.3)
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        state = lean_decode(q, kv, plan, scale=0.3, out_dtype=out_dtype)
        assert (state.out.dtype, state.lse.dtype) == (out_dtype, torch.float32)
        assert_close(state.out, expected.out, out_dtype)


def test_a_plan_serves_every_layer_and_equal_inputs_give_equal_bits(target, generator):
    lengths = [70, 1, 33]
    layers = [random_contexts(lengths, 2, 64, generator) for _ in range(2)]
    first = page_out(layers[0], 16, torch.Generator().manual_seed(3), device=target.device)
    second = page_out(layers[1], 16, torch.Generator().manual_seed(3), device=target.device)
    assert torch.equal(first.page_table, second.page_table)
    q = torch.randn(3, 6, 64, generator=generator).to(target.device)
    plan = plan_decode(first, 6, num_ctas=5, backend=target.backend)
    once = lean_decode(q, first, plan)
    expected = reference.lean_decode(q, second, plan)
    assert_close(lean_decode(q, second, plan).out, expected.out, torch.float32)
    again = lean_decode(q, first, plan)
    assert torch.equal(once.out, again.out)
    assert torch.equal(once.lse, again.lse)


def test_a_plan_for_the_other_backend_is_made_anew(target, generator):
    kv = page_out(random_contexts([40], 2, 64, generator), 16, generator, device=target.device)
    q = torch.randn(1, 4, 64, generator=generator).to(target.device)
    plan = plan_decode(kv, 4, window=20, backend=target.backend)
    assert_close(lean_decode(q, kv, plan, backend="portable").out, lean_decode(q, kv, plan).out, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 64)}, "multiple of 2"),
        ({"q": torch.zeros(2, 4, 32)}, r"\[\*, H, 64\]"),
        ({"q": torch.zeros(3, 4, 64)}, r"needed: \[2, 4, 64\]"),
        ({"q": torch.zeros(2, 6, 64)}, "plan for 4 query heads"),
        ({"q": torch.zeros(2, 4, 64).half()}, "allowed here: torch.float32"),
        ({"q": torch.zeros(2, 4, 64, requires_grad=True)}, "requires grad"),
        ({"softcap": 0.0}, "softcap 0.0"),
        ({"sinks": torch.zeros(3)}, r"float32 \[4\]"),
        ({"sinks": torch.zeros(4, requires_grad=True)}, "requires grad"),
        ({"out_dtype": torch.float64}, "allowed: torch.float32"),
        ({"backend": "cuda"}, "allowed: 'triton', 'portable'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, generator):
    kv = page_out(random_contexts([20, 4], 2, 64, generator), 16, generator)
    plan = plan_decode(kv, 4, backend="portable")
    arguments = {"q": torch.zeros(2, 4, 64)} | change
    with pytest.raises(ValueError, match=message):
        lean_decode(arguments.pop("q"), kv, plan, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "positive multiple"),
        ({"num_heads": 0}, "positive multiple"),
        ({"window": 0}, "at least 1"),
        ({"num_ctas": 0}, "at least 1"),
        ({"q_positions": torch.zeros(2)}, "int32"),
        ({"q_positions": torch.zeros(3, dtype=torch.int32)}, r"int32 \[2\]"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments, message, generator):
    kv = page_out(random_contexts([20, 4], 2, 64, generator), 16, generator)
    with pytest.raises(ValueError, match=message):
        plan_decode(kv, **({"num_heads": 4} | arguments))


def test_a_window_over_a_shard_needs_the_query_positions(generator):
    kv = page_out(random_contexts([90], 2, 64, generator), 16, generator, shard=1, shards=2)
    with pytest.raises(ValueError, match="no q_positions"):
        plan_decode(kv, 4, window=8)


def test_a_page_table_that_points_outside_is_refused_on_the_cpu(generator):
    kv = page_out(random_contexts([90], 2, 64, generator), 16, generator)
    outside = PagedKV(kv.k, kv.v, kv.page_table + 1000, kv.lengths)
    with pytest.raises(ValueError, match="the pool has 0 to"):
        plan_decode(outside, 4, backend="portable")
    too_long = PagedKV(kv.k, kv.v, kv.page_table, kv.lengths + 1000)
    with pytest.raises(ValueError, match="1090 tokens; allowed: 0 to 112"):
        plan_decode(too_long, 4, backend="portable")
