"""What a PagedKV accepts, and writing new tokens into one."""

import pytest
import torch

from closeness import assert_close
from lean_attention import PagedKV, append_kv
from paged_cache import page_out, random_contexts

POOL = torch.zeros(4, 2, 16, 64)
TABLE = torch.zeros(3, 2, dtype=torch.int32)
LENGTHS = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": POOL[0]}, r"both \[pages, K, T, D\]"),
        ({"v": POOL[:3]}, r"both \[pages, K, T, D\]"),
        ({"k": POOL.double(), "v": POOL.double()}, "float8_e4m3fn"),
        ({"v": POOL.half()}, "allowed: both"),
        ({"k": POOL.transpose(2, 3), "v": POOL.transpose(2, 3)}, "head dim"),
        ({"k": POOL[:, :, :0], "v": POOL[:, :, :0]}, "at least 1"),
        ({"page_table": TABLE.long()}, r"page_table .* needed: int32 \[B, max_pages\]"),
        ({"page_table": TABLE[0]}, r"page_table .* needed: int32 \[B, max_pages\]"),
        ({"lengths": LENGTHS[:2]}, r"lengths .* needed: int32 \[B\]"),
        ({"lengths": LENGTHS.long()}, r"lengths .* needed: int32 \[B\]"),
        ({"page_positions": TABLE[:, :1]}, r"page_positions .* needed: int32 \[B, max_pages\]"),
        ({"k_scale": torch.ones(1)}, "float8_e4m3fn pages only"),
        ({"k_scale": torch.ones(2)}, "k_scale .* one element"),
        ({"v_scale": torch.ones(1).double()}, "v_scale .* one element"),
        ({"lengths": LENGTHS.to("meta")}, "put all on one device"),
    ],
)
def test_what_is_no_paged_kv_is_refused(change, message):
    arguments = {"k": POOL, "v": POOL, "page_table": TABLE, "lengths": LENGTHS} | change
    with pytest.raises(ValueError, match=message):
        PagedKV(**arguments)


def test_any_strides_with_unit_stride_in_the_head_dim():
    kv = PagedKV(POOL.transpose(1, 2), POOL.transpose(1, 2), TABLE, LENGTHS)
    assert (kv.num_sequences, kv.num_kv_heads, kv.page_tokens, kv.head_dim) == (3, 16, 2, 64)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_append_writes_what_is_mine_and_nothing_else(dtype, layout, target, generator, request):
    if dtype == torch.float8_e4m3fn and target.interpreted:
        reason = "Triton's interpreter loses the carry when it rounds to float8: 7.9 becomes 4, not 8"
        request.applymarker(pytest.mark.xfail(reason=reason))
    scales = (0.5, 4.0) if dtype == torch.float8_e4m3fn else None
    contexts = random_contexts([20, 3], 2, 80, generator)
    kv = page_out(contexts, 16, generator, dtype=dtype, device=target.device, layout=layout, scales=scales)
    expected = [pool.clone() for pool in (kv.k, kv.v)]
    pages, slots = [2, -1, 0, 2, -7], [15, 3, 0, 4, 1]
    new = [torch.randn(5, 2, 80, generator=generator) * 3 for _ in range(2)]
    new[0][0, 0, 0] = 1e6
    new = [x.to(torch.bfloat16) for x in new]
    for pool, rows, scale in zip(expected, new, scales or (1.0, 1.0), strict=True):
        for i, (page, slot) in enumerate(zip(pages, slots, strict=True)):
            if page >= 0:
                row = rows[i].float() / scale
                pool[page, :, slot] = (row.clamp(-448, 448) if scales else row).to(pool.dtype)
    append_kv(
        *(x.to(target.device) for x in new), kv,
        torch.tensor(pages, dtype=torch.int32, device=target.device),
        torch.tensor(slots, dtype=torch.int32, device=target.device),
        backend=target.backend,
    )  # fmt: skip
    for actual, wanted in zip((kv.k, kv.v), expected, strict=True):
        actual, wanted = actual.float().cpu(), wanted.float().cpu()
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert_close(actual.nan_to_num(), wanted.nan_to_num(), 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_new": torch.zeros(2, 2, 32)}, r"\[tokens, 2, 64\]"),
        ({"v_new": torch.zeros(1, 2, 64)}, r"\[tokens, 2, 64\]"),
        ({"pages": torch.zeros(2)}, r"pages .* int32 \[2\]"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, r"slots .* int32 \[2\]"),
        ({"v_new": torch.zeros(2, 2, 64).half()}, "one floating-point dtype"),
        ({"k_new": torch.zeros(2, 2, 64, requires_grad=True)}, "requires grad"),
    ],
)
def test_what_cannot_be_appended_is_refused(change, message):
    kv = PagedKV(POOL, POOL, TABLE, LENGTHS)
    ids = torch.zeros(2, dtype=torch.int32)
    arguments = {"k_new": torch.zeros(2, 2, 64), "v_new": torch.zeros(2, 2, 64), "pages": ids, "slots": ids} | change
    with pytest.raises(ValueError, match=message):
        append_kv(arguments["k_new"], arguments["v_new"], kv, arguments["pages"], arguments["slots"])
