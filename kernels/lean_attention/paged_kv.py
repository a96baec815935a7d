"""A paged KV cache as the operators see it, and writing new tokens into it.

Shapes: B sequences, K KV heads, D head dim, P pages of the pool, T tokens of a page.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lean_attention.backend import Backend, choose_backend, refuse_gradients
from lean_attention.operators import operator

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
FP8_MAX = 448.0  # the largest finite float8_e4m3fn


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Keys and values of B sequences, in pages of T tokens.

    The pool is shared; `page_table` says which pages a sequence has, in the order of its tokens. Page j of a sequence
    holds its tokens j * T up to (j + 1) * T; slots from `lengths` on are never used and may hold anything, also NaN.
    A shard of a longer context is the same thing with its own pages, and `page_positions` says where they belong.

    Shapes, dtypes, devices and strides are checked here once, without reading the device; a wrong one raises
    ValueError. Page ids and lengths are trusted: reading them would synchronise.
    """

    k: Tensor
    """[P, K, T, D] float32, float16, bfloat16 or float8_e4m3fn; any strides with unit stride in D."""

    v: Tensor
    """Like k."""

    page_table: Tensor
    """[B, max_pages] int32: ids of each sequence's pages; entries past its last page are not read."""

    lengths: Tensor
    """[B] int32: the tokens a sequence has in these pages, the newest included; 0 is allowed."""

    page_positions: Tensor | None = None
    """[B, max_pages] int32: the absolute position of each listed page's first token. None means j * T."""

    k_scale: Tensor | None = None
    """float32, one element, for float8_e4m3fn pages: a key is k * k_scale. None means 1."""

    v_scale: Tensor | None = None
    """float32, one element, for float8_e4m3fn pages: a value is v * v_scale. None means 1."""

    def __post_init__(self) -> None:
        k, v = self.k, self.v
        if k.ndim != 4 or k.shape != v.shape:
            raise ValueError(f"PagedKV got k {tuple(k.shape)} and v {tuple(v.shape)}; needed: both [pages, K, T, D]")
        if k.dtype not in KV_DTYPES or v.dtype != k.dtype:
            raise ValueError(
                f"PagedKV got k {k.dtype} and v {v.dtype}; allowed: both float32, float16, bfloat16 or float8_e4m3fn"
            )
        if min(k.shape[1:]) < 1:
            raise ValueError(f"PagedKV got k {tuple(k.shape)}; KV heads, page tokens and head dim must be at least 1")
        if k.shape[3] > 1 and (k.stride(3) != 1 or v.stride(3) != 1):
            raise ValueError(
                f"PagedKV got strides k {k.stride()} and v {v.stride()}; the last one (head dim) must be 1: transpose "
                "other dimensions, or make the pool contiguous"
            )
        for name, tensor, shape in (
            ("page_table", self.page_table, "[B, max_pages]"),
            ("lengths", self.lengths, "[B]"),
            ("page_positions", self.page_positions, "[B, max_pages]"),
        ):
            if tensor is None:
                continue
            wanted = {"[B]": self.page_table.shape[:1], "[B, max_pages]": self.page_table.shape}[shape]
            if tensor.dtype != torch.int32 or tensor.shape != wanted or self.page_table.ndim != 2:
                raise ValueError(
                    f"PagedKV got {name} {tensor.dtype} {tuple(tensor.shape)} beside a page_table of "
                    f"{tuple(self.page_table.shape)}; needed: int32 {shape}"
                )
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
                raise ValueError(
                    f"PagedKV got {name} {scale.dtype} {tuple(scale.shape)}; needed: a float32 tensor of one element"
                )
            if scale is not None and k.dtype != torch.float8_e4m3fn:
                raise ValueError(f"PagedKV got {name} for {k.dtype} pages; scales go with float8_e4m3fn pages only")
        devices = {t.device for t in (k, v, self.page_table, self.lengths)}
        devices |= {t.device for t in (self.page_positions, self.k_scale, self.v_scale) if t is not None}
        if len(devices) > 1:
            raise ValueError(f"PagedKV got tensors on {sorted(map(str, devices))}; put all on one device")

    @classmethod
    def from_contiguous(cls, k: Tensor, v: Tensor, lengths: Tensor) -> "PagedKV":
        """One unpaged cache per sequence, seen as one page each. Nothing is copied.

        k and v are [B, K, S, D] with room for S tokens a sequence and any strides with unit stride in D: a cache laid
        out [B, S, K, D] comes in as `k.transpose(1, 2)`. lengths is [B] int32, each at most S.
        """
        if k.ndim != 4:
            raise ValueError(f"from_contiguous got k {tuple(k.shape)}; needed: [B, K, S, D]")
        page_table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]
        return cls(k, v, page_table, lengths)

    @property
    def num_sequences(self) -> int:
        return self.page_table.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def page_tokens(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def device(self) -> torch.device:
        return self.k.device


def check_queries(operator: str, q: Tensor, kv: PagedKV) -> None:
    """Raise ValueError unless q [*, H, D] can attend to kv: shape, dtype, device, and no gradient to record."""
    refuse_gradients(operator, q, kv.k, kv.v)
    if q.ndim != 3 or q.shape[2] != kv.head_dim or q.shape[1] < 1 or q.shape[1] % kv.num_kv_heads:
        raise ValueError(
            f"{operator} got q {tuple(q.shape)} for {kv.num_kv_heads} KV heads of {kv.head_dim}; needed: [*, H, "
            f"{kv.head_dim}] with H a multiple of {kv.num_kv_heads}"
        )
    allowed = (torch.float32, torch.float16, torch.bfloat16) if kv.k.dtype == torch.float8_e4m3fn else (kv.k.dtype,)
    if q.dtype not in allowed:
        raise ValueError(
            f"{operator} got q {q.dtype} for KV {kv.k.dtype}; allowed here: {', '.join(map(str, allowed))}"
        )
    if q.device != kv.device:
        raise ValueError(f"{operator} got q on {q.device} and KV on {kv.device}; put both on one device")


def append_kv(
    k_new: Tensor, v_new: Tensor, kv: PagedKV, pages: Tensor, slots: Tensor, *, backend: Backend | None = None
) -> None:
    """Write new tokens' keys and values into the pool of `kv`, in place.

    k_new and v_new are [tokens, K, D]; token i goes to page pages[i], slot slots[i] (both int32 [tokens]). A negative
    page means that another shard owns the token: nothing is written for it. No two tokens may share a page and slot.
    The values are cast to the pool's dtype; for float8_e4m3fn they are first divided by k_scale and v_scale, and
    clamped to +-448.

    Raises ValueError on other shapes, dtypes or devices. Page and slot ids are trusted: reading them would synchronise.
    """
    tokens = k_new.shape[0] if k_new.ndim else 0
    wanted = (tokens, kv.num_kv_heads, kv.head_dim)
    if tuple(k_new.shape) != wanted or tuple(v_new.shape) != wanted:
        raise ValueError(
            f"append_kv got k_new {tuple(k_new.shape)} and v_new {tuple(v_new.shape)}; needed: both [tokens, "
            f"{kv.num_kv_heads}, {kv.head_dim}]"
        )
    for name, ids in (("pages", pages), ("slots", slots)):
        if ids.dtype != torch.int32 or tuple(ids.shape) != (tokens,):
            raise ValueError(f"append_kv got {name} {ids.dtype} {tuple(ids.shape)}; needed: int32 [{tokens}]")
    if not k_new.is_floating_point() or k_new.dtype != v_new.dtype:
        raise ValueError(f"append_kv got k_new {k_new.dtype} and v_new {v_new.dtype}; needed: one floating-point dtype")
    devices = {t.device for t in (k_new, v_new, pages, slots, kv.k)}
    if len(devices) > 1:
        raise ValueError(f"append_kv got tensors on {sorted(map(str, devices))}; put all on one device")
    refuse_gradients("append_kv", k_new, v_new, kv.k, kv.v)
    backend = choose_backend(backend, kv.device)
    _append(k_new, v_new, kv.k, kv.v, kv.page_table, kv.lengths, kv.k_scale, kv.v_scale, pages, slots, backend)


@operator("lean_attention::append_kv", fake=lambda *arguments: None, mutates_args=("k", "v"))
def _append(
    k_new: Tensor,
    v_new: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    pages: Tensor,
    slots: Tensor,
    backend: str,
) -> None:
    if backend == "triton":
        from lean_attention.append import append_kv as append_on_triton

        kv = PagedKV(k, v, page_table, lengths, k_scale=k_scale, v_scale=v_scale)
        append_on_triton(k_new, v_new, kv, pages, slots)
        return
    mine = (pages >= 0).nonzero().flatten()
    all_mine = mine.shape[0] == pages.shape[0]
    pages, slots = pages[mine].long(), slots[mine].long()
    for pool, new, scale in ((k, k_new, k_scale), (v, v_new, v_scale)):
        rows = new if all_mine else new[mine]
        if pool.dtype == torch.float8_e4m3fn:
            rows = rows.float() if scale is None else rows.float() / scale
            rows = rows.clamp(-FP8_MAX, FP8_MAX)
        pool[pages, :, slots] = rows.to(pool.dtype)
