"""Paged KV caches for tests: any lengths, pages dealt to any number of shards, NaN in every slot that nobody wrote.

Shapes: B sequences, K KV heads, D head dim, T tokens of a page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_attention import PagedKV

UNLISTED = -(1 << 20)  # in a page table: an entry that nobody may read


@dataclass(frozen=True)
class Contexts:
    """The keys and values of some sequences, before they are paged."""

    keys: list[Tensor]
    """[length, K, D] float32 each."""
    values: list[Tensor]

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(k) for k in self.keys], dtype=torch.int32)


def random_contexts(lengths: Sequence[int], kv_heads: int, head_dim: int, generator: torch.Generator) -> Contexts:
    def draw(length: int) -> Tensor:
        return torch.randn(length, kv_heads, head_dim, generator=generator)

    return Contexts([draw(n) for n in lengths], [draw(n) for n in lengths])


def page_out(
    contexts: Contexts,
    page_tokens: int,
    generator: torch.Generator,
    *,
    shard: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "HND",
    shuffled: bool = True,
    scales: tuple[float, float] | None = None,
) -> PagedKV:
    """The pages of `contexts` that `shard` of `shards` holds (dealt in turn), in a pool otherwise full of NaN.

    layout is the pool's memory order, HND or NHD. scales are k_scale and v_scale; the pool then holds keys / k_scale.
    """
    T = page_tokens
    _, K, D = contexts.keys[0].shape
    mine = [list(range(0, len(k), T))[shard::shards] for k in contexts.keys]
    num_pages = sum(map(len, mine)) + 3
    ids = torch.randperm(num_pages, generator=generator) if shuffled else torch.arange(num_pages)
    free = iter(ids.tolist())
    width = max(map(len, mine)) + 1
    table = torch.full((len(mine), width), UNLISTED, dtype=torch.int32)
    positions = torch.full((len(mine), width), UNLISTED, dtype=torch.int32)
    lengths = torch.zeros(len(mine), dtype=torch.int32)
    shape = (num_pages, T, K, D) if layout == "NHD" else (num_pages, K, T, D)
    pools = [torch.full(shape, float("nan")) for _ in range(2)]
    pools = [pool.transpose(1, 2) if layout == "NHD" else pool for pool in pools]
    divisors = scales or (1.0, 1.0)
    for b, starts in enumerate(mine):
        for j, start in enumerate(starts):
            page = next(free)
            table[b, j], positions[b, j] = page, start
            for pool, dense, divisor in zip(pools, (contexts.keys[b], contexts.values[b]), divisors, strict=True):
                rows = dense[start : start + T].transpose(0, 1)
                pool[page, :, : rows.shape[1]] = rows / divisor
            lengths[b] += min(T, len(contexts.keys[b]) - start)
    k, v = (pool.to(device, dtype) for pool in pools)
    return PagedKV(
        k, v, table.to(device), lengths.to(device),
        page_positions=None if shards == 1 else positions.to(device),
        k_scale=None if scales is None else torch.tensor(scales[0], device=device),
        v_scale=None if scales is None else torch.tensor([scales[1]], device=device),
    )  # fmt: skip
