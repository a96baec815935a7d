"""Attention of some queries over one tile of keys, in PyTorch: a state for each query.

On the CPU it is torch's fused kernel, which keeps the scores of a block of keys in the cache, accumulates in float32
and returns the log-sum-exp as well. Other devices, and logits with a soft cap, take matrix products.

Which keys the fused kernel takes as they lie is tried once a process (`native_dtype`): float32, and bfloat16 where the
scores stay in float32. There the weights are rounded to bfloat16 before they multiply the values, and the result is;
neither is where keys are converted to float32 first.

Shapes: B independent tiles, K KV heads, G queries of a group, N query tokens, D head dim, S keys of a tile.
"""

import platform
from functools import lru_cache

import torch
from torch import Tensor

NO_KEY = float("-inf")
SCORE_ELEMENTS = 1 << 20
"""Of one block of scores or of a bias: 4 MB of float32."""
PART_TOKENS = 512
"""The fewest keys that are worth a thread of their own; the fused kernel walks as many at a time."""
ROWS_OF_A_THREAD = 32
"""The queries that the fused kernel gives one thread together, where there are few."""


def native_dtype(pool: Tensor) -> torch.dtype:
    """What keys and values are multiplied as: their own dtype where the fused kernel takes it, else float32."""
    return pool.dtype if pool.device.type == "cpu" and _fused_takes(pool.dtype) else torch.float32


def attend(
    q_BKGND: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias_BNS: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The state of every query: out [B, K, G, N, D] float32 or in the dtype of the keys, lse [B, K, G, N] float32.

    All three are of one dtype, `native_dtype`'s. bias_BNS is float32, 0 or -inf, [B, 1, S] or [1, N, S]. Where `causal`
    (with B = 1 and no bias), query n sees keys 0 to n. A query that sees no key has out 0 and lse -inf.
    """
    if softcap is None and k_BKSD.device.type == "cpu" and _fused_takes(k_BKSD.dtype):
        out, lse = _attend_fused(q_BKGND, k_BKSD, v_BKSD, scale, bias_BNS, causal)
        if bias_BNS is not None:
            # The fused kernel gives such a query an lse of 0.
            lse = lse.masked_fill((bias_BNS.amax(-1) == NO_KEY)[:, None, None], NO_KEY)
        return out, lse
    return _attend_in_products(q_BKGND, k_BKSD, v_BKSD, scale, softcap, bias_BNS, causal)


def attend_to_one(
    q_1KGND: Tensor, k_RKSD: Tensor, v_RKSD: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The state of the same queries over all R pieces together, [1, K, G, N, D] and [1, K, G, N]."""
    queries = q_1KGND.expand(k_RKSD.shape[0], -1, -1, -1, -1)
    out, lse = attend(queries, k_RKSD, v_RKSD, scale=scale, softcap=softcap)
    return (out, lse) if k_RKSD.shape[0] == 1 else _merge_pieces(out, lse)


def _merge_pieces(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge states [R, ..., D] and [R, ...], each over a key or more, into [1, ..., D] and [1, ...]."""
    largest = lse.amax(0, keepdim=True)
    weight = (lse - largest).exp_()
    sums = weight.sum(0, keepdim=True)
    # In place: `out` was made for this, and may be as large as 4 MB.
    return out.float().mul_((weight / sums).unsqueeze(-1)).sum(0, keepdim=True), largest + sums.log()


def _attend_fused(
    q_BKGND: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, bias_BNS: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    B, K, G, N, D = q_BKGND.shape
    mask = None if bias_BNS is None else bias_BNS[:, None]
    if causal or (mask is not None and N > 1):
        # The kernel's mask goes by query row: KV heads as its batch, the group as its heads, which share their keys.
        keys, values = (x[0].unsqueeze(1).expand(-1, G, -1, -1) for x in (k_BKSD, v_BKSD))
        out, lse = _fused(q_BKGND[0], keys, values, scale, mask, causal)
        return out[None], lse[None]
    rows_BKMD = q_BKGND.reshape(B, K, G * N, D)
    parts = _parts(B * K * -(-G * N // ROWS_OF_A_THREAD), k_BKSD.shape[2]) if B == 1 and mask is None else 1
    if parts == 1:
        out, lse = _fused(rows_BKMD, k_BKSD, v_BKSD, scale, mask)
    else:
        out, lse = _attend_to_parts(rows_BKMD, k_BKSD, v_BKSD, scale, parts)
    return out.reshape(B, K, G, N, D), lse.reshape(B, K, G, N)


def _parts(busy: int, keys: int) -> int:
    """Into how many parts to cut the keys, so that every thread has work: at least two pieces each."""
    threads = torch.get_num_threads()
    return 1 if busy >= 2 * threads else min(-(-2 * threads // busy), max(1, keys // PART_TOKENS))


def _attend_to_parts(q_1KMD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor, scale: float, parts: int) -> tuple[Tensor, Tensor]:
    """One tile cut into `parts` that are attended to side by side, as a batch, and a rest; then merged."""
    length = k_1KSD.shape[2] // parts
    keys, values = (x[0, :, : parts * length].unflatten(1, (parts, length)).transpose(0, 1) for x in (k_1KSD, v_1KSD))
    states = [_fused(q_1KMD.expand(parts, -1, -1, -1), keys, values, scale)]
    if parts * length < k_1KSD.shape[2]:
        states.append(_fused(q_1KMD, k_1KSD[:, :, parts * length :], v_1KSD[:, :, parts * length :], scale))
    return _merge_pieces(torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states]))


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """torch's kernel: q [B, H, N, D], k and v [B, H, S, D], any strides with unit stride in D."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


@lru_cache
def _fused_takes(dtype: torch.dtype) -> bool:
    """Whether the fused kernel, which is private to torch, is there and right for `dtype`: it is tried.

    For bfloat16 only with MKL's products, which give float32. The plain ones round scores to bfloat16, an error of 3e-2
    in a logit of 10; a trial's lse would tell.
    """
    if dtype == torch.bfloat16:
        if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkl.is_available():
            return False
    elif dtype != torch.float32:
        return False
    k = torch.arange(1024 * 64, dtype=torch.float32).mul_(0.37).sin_().view(1, 1, 1024, 64).to(dtype)
    q, v = k[:, :, 100:104] * 2, k.flip(2)
    try:
        out, lse = _fused(q, k, v, 0.5)
    except (AttributeError, RuntimeError, TypeError):
        return False
    right_out, right_lse = _attend_in_products(q[:, :, None], k, v, 0.5, None, None, False)
    error_out, error_lse = (out - right_out[0]).abs().max(), (lse - right_lse[0]).abs().max()
    return bool(error_out < (1e-5 if dtype == torch.float32 else 1e-2)) and bool(error_lse < 1e-3)


def _attend_in_products(
    q_BKGND: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    scale: float,
    softcap: float | None,
    bias_BNS: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The same in float32 products and an explicit softmax, block by block of queries."""
    B, K, G, N, D = q_BKGND.shape
    S = k_BKSD.shape[2]
    q_BKGND, k_BKSD, v_BKSD = q_BKGND.float() * scale, k_BKSD.float(), v_BKSD.float()
    out = q_BKGND.new_empty(B, K, G, N, D)
    lse = q_BKGND.new_empty(B, K, G, N)
    block = max(1, SCORE_ELEMENTS // max(1, B * K * G * S))
    for begin in range(0, N, block):
        rows = slice(begin, min(begin + block, N))
        n = rows.stop - begin
        scores = (q_BKGND[:, :, :, rows].reshape(B, K, G * n, D) @ k_BKSD.transpose(2, 3)).view(B, K, G, n, S)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if causal:
            unseen = torch.ones(n, S, dtype=torch.bool, device=scores.device).triu_(begin + 1)
            scores.masked_fill_(unseen, NO_KEY)
        if bias_BNS is not None:
            scores += (bias_BNS if bias_BNS.shape[1] == 1 else bias_BNS[:, rows])[:, None, None]
        lse[:, :, :, rows] = scores.logsumexp(-1)
        # Without a key the lse is -inf, and -inf - -inf would be NaN.
        reachable = lse[:, :, :, rows].masked_fill(lse[:, :, :, rows] == NO_KEY, 0.0)
        weights = scores.sub_(reachable[..., None]).exp_()
        out[:, :, :, rows] = (weights.view(B, K, G * n, S) @ v_BKSD).view(B, K, G, n, D)
    return out, lse
