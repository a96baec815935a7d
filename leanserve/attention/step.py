"""One step's attention: planned once, called by the model once per layer."""

from dataclasses import dataclass

import torch

from lean_attention import Backend, DecodePlan, append_kv, plan_decode
from leanserve.attention.kv_shard import KvShard
from leanserve.attention.sharded_decode import sharded_decode
from leanserve.attention.sharded_prefill import PrefillShare, sharded_prefill
from leanserve.distributed.ranks import Ranks

__all__ = ["SequencePages", "StepAttention", "StepLayout"]


@dataclass(frozen=True)
class SequencePages:
    """This rank's pages of some sequences, up to and including this step's tokens."""

    page_table_BM: torch.Tensor
    """int32, padded with 0."""
    lengths_B: torch.Tensor
    """int32: tokens of this rank's pages."""
    page_positions_BM: torch.Tensor
    """int32: absolute position of each page's first token."""

    @property
    def num_sequences(self) -> int:
        return self.lengths_B.shape[0]


@dataclass(frozen=True)
class StepLayout:
    """Where this rank's N tokens of a step stand: all decode rows first, then the prefill tokens that it owns."""

    positions_N: torch.Tensor
    """int32, absolute."""
    pages_N: torch.Tensor
    """int32: this rank's page for each token's key and value, or -1 where another rank owns it."""
    slots_N: torch.Tensor
    """int32: the slot inside that page."""
    decode: SequencePages | None
    """None in a step without decode rows."""
    prefill: SequencePages | None
    share: PrefillShare | None
    """Both None in a step without prefill."""


class StepAttention:
    """The model's `attend` for one step: stores K and V where they are owned, attends over all ranks.

    Args:
        windows: sliding window per layer, None for full attention.
        backend: of the operators, None for the device's own.
    """

    def __init__(
        self,
        layout: StepLayout,
        shard: KvShard,
        ranks: Ranks,
        *,
        num_heads: int,
        windows: tuple[int | None, ...],
        backend: Backend | None = None,
    ) -> None:
        self._layout = layout
        self._shard = shard
        self._ranks = ranks
        self._windows = windows
        self._backend: Backend | None = backend
        self._plans: dict[int | None, DecodePlan] = {}
        if layout.decode is not None:
            kv = self._view(0, layout.decode)
            positions_B = layout.positions_N[: layout.decode.num_sequences]
            for window in set(windows):
                self._plans[window] = plan_decode(
                    kv, num_heads, window=window, q_positions=positions_B, backend=backend
                )

    def _view(self, layer: int, pages: SequencePages):
        return self._shard.view(layer, pages.page_table_BM, pages.lengths_B, pages.page_positions_BM)

    def __call__(self, layer: int, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor) -> torch.Tensor:
        """Attention output [N, H, D] in q's dtype."""
        layout, window = self._layout, self._windows[layer]
        pages = layout.decode or layout.prefill
        assert pages is not None, "a step has rows"
        kv = self._view(layer, pages)
        append_kv(k_NKD, v_NKD, kv, layout.pages_N, layout.slots_N, backend=self._backend)
        parts, split = [], 0
        if layout.decode is not None:
            split = layout.decode.num_sequences
            kv = self._view(layer, layout.decode)
            parts.append(sharded_decode(q_NHD[:split], kv, self._plans[window], self._ranks))
        if layout.prefill is not None:
            assert layout.share is not None
            kv = self._view(layer, layout.prefill)
            parts.append(
                sharded_prefill(q_NHD[split:], kv, layout.share, self._ranks, window=window, backend=self._backend)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
