"""One tile's attention: torch's fused kernel against plain products, whatever is masked and however it is cut."""

from collections.abc import Iterator

import pytest
import torch

from closeness import assert_close
from lean_attention import lean_decode, plan_decode, reference, tile_attention
from lean_attention.tile_attention import attend, native_dtype
from paged_cache import page_out, random_contexts

NO_KEY = float("-inf")


@pytest.fixture
def fresh_trial() -> Iterator[None]:
    """Which dtypes the fused kernel takes is tried anew, in the test and after it."""
    tile_attention._fused_takes.cache_clear()
    yield
    tile_attention._fused_takes.cache_clear()


def draw(generator: torch.Generator, B: int, N: int, S: int, dtype: torch.dtype = torch.float32):
    shapes = ((B, 2, 3, N, 32), (B, 2, S, 32), (B, 2, S, 32))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def products(q, k, v, bias=None, causal=False):
    return tile_attention._attend_in_products(q, k, v, 0.3, None, bias, causal)


@pytest.mark.parametrize(
    ("B", "N", "S", "mask"),
    [
        (1, 1, 1, None), (1, 40, 700, None), (3, 1, 700, None), (3, 1, 70, "row"), (1, 40, 70, "block"),
        (1, 40, 40, "causal"), (1, 600, 530, "causal"), (1, 30, 1, "causal"),
    ],
)  # fmt: skip
def test_the_fused_kernel_agrees_with_products(B, N, S, mask, generator):
    q, k, v = draw(generator, B, N, S)
    bias = None
    if mask in ("row", "block"):
        shape = (B, 1, S) if mask == "row" else (1, N, S)
        bias = torch.where(torch.rand(shape, generator=generator) < 0.6, 0.0, NO_KEY)
        bias[-1, -1] = NO_KEY  # a query that sees nothing
    actual = attend(q, k, v, scale=0.3, bias_BNS=bias, causal=mask == "causal")
    for state, expected in zip(actual, products(q, k, v, bias, mask == "causal"), strict=True):
        assert_close(state, expected, torch.float32)


@pytest.mark.parametrize("threads", [1, 4, 7])
def test_a_tile_is_cut_where_threads_would_idle(threads, generator, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v = draw(generator, 1, 1, 3001)
    actual = attend(q, k, v, scale=0.3)
    for state, expected in zip(actual, products(q, k, v), strict=True):
        assert_close(state, expected, torch.float32)


def test_bfloat16_keys_keep_float32_scores(generator):
    """Logits of 10: rounded to bfloat16 they would be off by 3e-2. On any CPU, by one path or the other."""
    q, k, v = draw(generator, 1, 4, 700, torch.bfloat16)
    q = q * 8
    dtype = native_dtype(k)
    out, lse = attend(q.to(dtype), k.to(dtype), v.to(dtype), scale=0.3)
    expected_out, expected_lse = products(q, k, v)
    assert expected_lse.max() > 20
    assert_close(lse, expected_lse, 1e-3)
    assert_close(out, expected_out, torch.bfloat16)


@pytest.mark.usefixtures("fresh_trial")
@pytest.mark.parametrize("fault", [AttributeError, RuntimeError, None])
def test_where_the_fused_kernel_is_missing_or_wrong_products_serve(fault, generator, monkeypatch):
    fused = tile_attention._fused

    def spoiled(q, k, v, scale, mask=None, causal=False):
        if fault is not None:
            raise fault
        out, lse = fused(q, k, v, scale, mask, causal)
        return out, lse.bfloat16().float()

    monkeypatch.setattr(tile_attention, "_fused", spoiled)
    for dtype in (torch.float32, torch.bfloat16):
        kv = page_out(random_contexts([0, 130], 2, 32, generator), 16, generator, dtype=dtype)
        assert native_dtype(kv.k) == torch.float32
        q = torch.randn(2, 6, 32, generator=generator).to(dtype)
        plan = plan_decode(kv, 6, backend="portable")
        actual, expected = lean_decode(q, kv, plan), reference.lean_decode(q, kv, plan)
        assert_close(actual.out, expected.out, torch.float32)
        assert_close(actual.lse, expected.lse, torch.float32)
