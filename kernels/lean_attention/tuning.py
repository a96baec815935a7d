"""Tile, warp and pipeline choices for the Triton kernels: one table, in data.

No choice is made by timing at serving time. A row was chosen by what the compiler makes of it (registers, spills, bytes in
flight per multiprocessor; kernels/variants.md lists them), until a benchmark on the device in question says better.
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch
import triton

ArchFamily = Literal["ampere", "hopper", "blackwell", "cdna", "interpreter"]

INTERPRETER_CTAS = 7
"""The grid where there are no multiprocessors: odd, so that runs cross rows."""


@dataclass(frozen=True)
class DecodeTuning:
    """How the stream-K decode kernel is built and dealt out."""

    tile: int
    """Tokens of a tile; a power of two of at least 16."""
    num_warps: int
    num_stages: int
    """Tiles of K and of V in shared memory: one is used, the others are on their way."""
    ctas_per_sm: int
    min_tiles: int = 1
    """A CTA with fewer tiles than this is left idle: merging more pieces would cost more than it saves."""
    fan_in: int = 32
    """Pieces that one CTA merges alone; a row of more is merged in two levels."""


@dataclass(frozen=True)
class PrefillTuning:
    """How the prefill kernel is built."""

    rows: int
    """Query rows (tokens x heads of the group) of a CTA."""
    tile: int
    """Key tokens of a tile."""
    num_warps: int
    num_stages: int


def head_block(head_dim: int) -> int:
    """The head dim as the kernels lay it out: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def arch_family(device: torch.device) -> ArchFamily:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    major, _ = torch.cuda.get_device_capability(device)
    return "ampere" if major < 9 else "hopper" if major == 9 else "blackwell"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_ctas(device: torch.device, ctas_per_sm: int) -> int:
    """The default grid."""
    if device.type != "cuda":
        return INTERPRETER_CTAS
    return torch.cuda.get_device_properties(device).multi_processor_count * ctas_per_sm


# (head block, bytes of a KV element) -> tuning. A tile of K and V is 2 * tile * head block * bytes; `num_stages - 1` of
# them are in flight per CTA. Meant: 48 to 96 KB in flight per multiprocessor, within its shared memory.
_DECODE: dict[tuple[int, int], DecodeTuning] = {
    (64, 1): DecodeTuning(tile=128, num_warps=4, num_stages=3, ctas_per_sm=2),
    (64, 2): DecodeTuning(tile=128, num_warps=4, num_stages=3, ctas_per_sm=2),
    (64, 4): DecodeTuning(tile=64, num_warps=4, num_stages=3, ctas_per_sm=2),
    (128, 1): DecodeTuning(tile=64, num_warps=4, num_stages=4, ctas_per_sm=2),
    (128, 2): DecodeTuning(tile=64, num_warps=4, num_stages=3, ctas_per_sm=2),
    (128, 4): DecodeTuning(tile=32, num_warps=4, num_stages=3, ctas_per_sm=2),
    (256, 1): DecodeTuning(tile=64, num_warps=8, num_stages=3, ctas_per_sm=2),
    (256, 2): DecodeTuning(tile=32, num_warps=4, num_stages=3, ctas_per_sm=2),
    (256, 4): DecodeTuning(tile=16, num_warps=4, num_stages=3, ctas_per_sm=2),
}

_INTERPRETER_DECODE = DecodeTuning(tile=32, num_warps=4, num_stages=1, ctas_per_sm=1, fan_in=4)

# (head block, bytes of a query element) -> tuning.
_PREFILL: dict[tuple[int, int], PrefillTuning] = {
    (64, 2): PrefillTuning(rows=128, tile=64, num_warps=4, num_stages=3),
    (64, 4): PrefillTuning(rows=64, tile=32, num_warps=4, num_stages=2),
    (128, 2): PrefillTuning(rows=128, tile=64, num_warps=8, num_stages=3),
    (128, 4): PrefillTuning(rows=32, tile=32, num_warps=4, num_stages=2),
    (256, 2): PrefillTuning(rows=64, tile=64, num_warps=8, num_stages=2),
    (256, 4): PrefillTuning(rows=32, tile=16, num_warps=8, num_stages=2),
}


def decode_tuning(head_dim: int, kv_dtype: torch.dtype, group: int, family: ArchFamily) -> DecodeTuning:
    """The decode kernel's row of the table for KV of `kv_dtype`."""
    if family == "interpreter":
        return _INTERPRETER_DECODE
    return _DECODE[max(64, head_block(head_dim)), kv_dtype.itemsize]


def prefill_tuning(head_dim: int, q_dtype: torch.dtype, family: ArchFamily) -> PrefillTuning:
    """The prefill kernel's row of the table for queries of `q_dtype`."""
    return _PREFILL[max(64, head_block(head_dim)), q_dtype.itemsize]
