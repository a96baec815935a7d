"""This rank's part of the KV cache: a pool of pages, and views of it for the kernels. Knows no other rank."""

import torch

from lean_attention import PagedKV

__all__ = ["KvShard"]


class KvShard:
    """Page pool `[layers][k|v][P pages, K kv_heads, T page_tokens, D head_dim]` on one device.

    One (page, head) is contiguous. Pages are recycled as they are: whatever was left in an unwritten slot, NaN
    included, is never read into a result.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_layers = num_layers
        self.pool_L2PKTD = torch.empty(
            (num_layers, 2, num_pages, num_kv_heads, page_tokens, head_dim), dtype=dtype, device=device
        )

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy whole pages: all sources are read before any target is written. Both int64, on the pool's device."""
        self.pool_L2PKTD[:, :, targets] = self.pool_L2PKTD[:, :, sources]

    def view(
        self,
        layer: int,
        page_table_BM: torch.Tensor,
        lengths_B: torch.Tensor,
        page_positions_BM: torch.Tensor,
    ) -> PagedKV:
        """One layer's keys and values of some sequences.

        Args:
            page_table_BM: int32, this rank's pages of each sequence in order of position.
            lengths_B: int32, tokens in those pages.
            page_positions_BM: int32, absolute position of each page's first token.
        """
        k, v = self.pool_L2PKTD[layer]
        return PagedKV(k, v, page_table_BM, lengths_B, page_positions_BM)
