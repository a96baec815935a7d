"""The caches that a case is measured on: one set of pages and tables, several copies of the keys and values.

Shapes: B sequences, H query heads, K KV heads, D head dim, P pages, T tokens of a page, S tokens.
"""

import math
from dataclasses import dataclass

import torch
from cases import Case
from clock import cache_bytes
from torch import Tensor

from lean_attention import PagedKV


@dataclass(frozen=True)
class Caches:
    """Inputs of one case. All copies share page_table and lengths, so that one plan serves them all."""

    case: Case
    q: Tensor
    """[B, H, D]."""
    paged: list[PagedKV]

    def contiguous(self) -> list[tuple[Tensor, Tensor]]:
        """k, v [B, K, S, D] with the same contents, for peers that know no pages; uniform cases only."""
        assert self.case.uniform
        return [(_unpaged(kv, kv.k), _unpaged(kv, kv.v)) for kv in self.paged]


def bytes_needed(case: Case, copies: int) -> int:
    """Device memory of a case: pages, the contiguous twin, and room for the gate."""
    return int(case.kv_bytes * copies * (2.1 if case.uniform else 1.1)) + (1 << 30)


def copies_needed(case: Case, device: torch.device) -> int:
    """How many copies outgrow twice the cache."""
    return max(
        1, min(64, math.ceil(2 * cache_bytes(device) / case.kv_bytes)) + (case.kv_bytes < 2 * cache_bytes(device))
    )


def make_caches(case: Case, device: torch.device, copies: int, *, shuffled: bool = True) -> Caches:
    """Random keys and values. Pages are dealt out shuffled, or in ascending order."""
    H, K, D = case.heads
    T, dtype = case.page_tokens, getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(1)
    pages = [math.ceil(n / T) for n in case.lengths]
    order = torch.randperm(sum(pages), generator=generator, device=device) if shuffled else torch.arange(sum(pages))
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    start = 0
    for b, count in enumerate(pages):
        table[b, :count] = order[start : start + count]
        start += count
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    table = table.to(device)

    def draw(*shape: int) -> Tensor:
        # float8 has no random fill of its own.
        filled = torch.empty(shape, device=device, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
        return filled.normal_(generator=generator).to(dtype)

    paged = [PagedKV(draw(sum(pages), K, T, D), draw(sum(pages), K, T, D), table, lengths) for _ in range(copies)]
    q_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    return Caches(case, torch.randn(len(pages), H, D, device=device, generator=generator).to(q_dtype), paged)


def _unpaged(kv: PagedKV, pool: Tensor) -> Tensor:
    B, max_pages = kv.page_table.shape
    _, K, T, D = pool.shape
    pages = pool[kv.page_table.flatten().long()].view(B, max_pages, K, T, D)
    tokens = max_pages * T
    return pages.permute(0, 2, 1, 3, 4).reshape(B, K, tokens, D)[:, :, : int(kv.lengths[0])].contiguous()
