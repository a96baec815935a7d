"""Tile, warp and pipeline choices for the Triton kernels: one table, in data.

No choice is made by timing at serving time. A row was chosen by what the compiler makes of it (registers, spills,
bytes in flight per multiprocessor; kernels/variants.md lists them), until a benchmark on the device in question says
better.
"""

import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton

from lean_attention.paged_kv import PagedKV

ArchFamily = Literal["ampere", "ada", "hopper", "blackwell", "cdna", "interpreter"]

MAX_HEAD_DIM = 256

NVIDIA = ("ampere", "ada", "hopper", "blackwell")

REGISTERS_PER_SM = 1 << 16
MAX_REGISTERS = 255
"""Of one thread. Both of every NVIDIA GPU from compute capability 8.0 on."""

SERVER_SHARED_BYTES = 164 << 10
"""Shared memory of one multiprocessor of the smallest server chip (8.0)."""

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


def check_head_dim(operator: str, head_dim: int) -> None:
    """Raise ValueError for a head dim that the Triton kernels do not serve."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"the Triton {operator} kernel got head dim {head_dim}; allowed: up to {MAX_HEAD_DIM}. Use "
            "backend='portable' beyond"
        )


def kernel_page_tokens(kv: PagedKV) -> int:
    """The page size that the kernels are compiled for.

    With one page to a sequence no tile crosses a page border, so that contiguous caches of every length share one
    binary.
    """
    return 1 << 30 if kv.page_table.shape[1] == 1 else kv.page_tokens


def arch_family(device: torch.device) -> ArchFamily:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    properties = torch.cuda.get_device_properties(device)
    return nvidia_family(properties.major, properties.shared_memory_per_multiprocessor)


def nvidia_family(major: int, shared_bytes_per_sm: int) -> ArchFamily:
    """The family of compute capability `major`.x: "ada" is whatever has less shared memory than the server chips (8.6,
    8.9, 12.x: 100 KB; consumer Blackwell has Ampere's instructions too)."""
    if shared_bytes_per_sm < SERVER_SHARED_BYTES:
        return "ada"
    if major == 9:
        return "hopper"
    return "blackwell" if major == 10 else "ampere"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dot_precision(q_dtype: torch.dtype, family: ArchFamily) -> str:
    """Triton's `input_precision`, which float32 products heed. Its default on NVIDIA, TF32, has 11 bits.

    Three TF32 products on the tensor cores are as good as one in float32 to 2^-21; real float32 products ("ieee") have
    no tensor cores and spill registers at head dim 128.
    """
    return "tf32x3" if q_dtype == torch.float32 and family in NVIDIA else "ieee"


def decode_launch(num_warps: int, num_stages: int, ctas_per_sm: int, family: ArchFamily) -> dict[str, int | bool]:
    """The launch options of the decode kernel.

    The grid counts on `ctas_per_sm` CTAs at once, so no thread may take more registers than they leave it. Left alone,
    a compiler that sees no reason to save takes more (Triton 3.6, head dim 64: 243 where 168 do without a spill), and
    every third CTA would wait for another one to end.
    """
    options: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    registers = REGISTERS_PER_SM // (32 * num_warps * ctas_per_sm) // 8 * 8
    if family in NVIDIA and registers < MAX_REGISTERS:
        options["maxnreg"] = registers
    return options


def device_ctas(device: torch.device, ctas_per_sm: int) -> int:
    """The default grid."""
    if device.type != "cuda":
        return INTERPRETER_CTAS
    return torch.cuda.get_device_properties(device).multi_processor_count * ctas_per_sm


# (head block, bytes of a KV element) -> tuning. A tile of K and V is 2 * tile * head block * bytes, of which a CTA has
# between num_stages - 2 and num_stages - 1 in flight. Meant: 48 to 96 KB in flight per multiprocessor, and registers
# for that many CTAs (65,536 / (32 * num_warps * registers)). On sm_90, group 4, the compiler gives:
#   (64, 2)   tile 64: 168 registers, so 3 CTAs; tile 128 needs 255 and spills with a window
#   (128, 2)  tile 64: 250 registers, 2 CTAs of 70 KB; 289 instructions a tile of 32 KB, a fifth of the time HBM takes
#   (128, 4)  the products of float32 are three of TF32 (see dot_precision); as "ieee" they spill 296 bytes
#   (256, 4)  4 warps spill 128 bytes, 8 spill 24
# As many CTAs as a row says fit into the multiprocessor's shared memory with a window too, which takes a tile more.
_DECODE: dict[tuple[int, int], DecodeTuning] = {
    (64, 1): DecodeTuning(tile=128, num_warps=4, num_stages=4, ctas_per_sm=2),
    (64, 2): DecodeTuning(tile=64, num_warps=4, num_stages=4, ctas_per_sm=3),
    (64, 4): DecodeTuning(tile=32, num_warps=4, num_stages=4, ctas_per_sm=2),
    (128, 1): DecodeTuning(tile=64, num_warps=4, num_stages=4, ctas_per_sm=2),
    (128, 2): DecodeTuning(tile=64, num_warps=4, num_stages=3, ctas_per_sm=2),
    (128, 4): DecodeTuning(tile=16, num_warps=4, num_stages=4, ctas_per_sm=2),
    (256, 1): DecodeTuning(tile=32, num_warps=4, num_stages=4, ctas_per_sm=2),
    (256, 2): DecodeTuning(tile=32, num_warps=4, num_stages=3, ctas_per_sm=2),
    (256, 4): DecodeTuning(tile=16, num_warps=8, num_stages=3, ctas_per_sm=1),
}

# 164 KB of shared memory a multiprocessor, less than Hopper's 228.
_AMPERE_DECODE = _DECODE | {
    (64, 2): DecodeTuning(tile=64, num_warps=4, num_stages=3, ctas_per_sm=3),
    (128, 2): DecodeTuning(tile=32, num_warps=4, num_stages=3, ctas_per_sm=3),
    (128, 4): DecodeTuning(tile=16, num_warps=4, num_stages=3, ctas_per_sm=2),
    (256, 2): DecodeTuning(tile=16, num_warps=4, num_stages=4, ctas_per_sm=2),
}

# 100 KB of shared memory a multiprocessor, of which a CTA costs 1 KB more than it uses: two CTAs may have 49 KB each.
# Memory is slower here, so 16 to 64 KB in flight do. Where 16 tokens a tile and three stages are too much for two
# (float32; fp8 at 256 spills at 16), there is one.
_ADA_DECODE: dict[tuple[int, int], DecodeTuning] = {
    (64, 1): DecodeTuning(tile=64, num_warps=4, num_stages=4, ctas_per_sm=2),
    (64, 2): DecodeTuning(tile=64, num_warps=4, num_stages=3, ctas_per_sm=2),
    (64, 4): DecodeTuning(tile=32, num_warps=4, num_stages=3, ctas_per_sm=1),
    (128, 1): DecodeTuning(tile=32, num_warps=4, num_stages=4, ctas_per_sm=2),
    (128, 2): DecodeTuning(tile=32, num_warps=4, num_stages=3, ctas_per_sm=2),
    (128, 4): DecodeTuning(tile=16, num_warps=4, num_stages=3, ctas_per_sm=1),
    (256, 1): DecodeTuning(tile=32, num_warps=4, num_stages=3, ctas_per_sm=1),
    (256, 2): DecodeTuning(tile=16, num_warps=4, num_stages=3, ctas_per_sm=2),
    (256, 4): DecodeTuning(tile=16, num_warps=8, num_stages=2, ctas_per_sm=1),
}

_SMALL_DECODE = {"ampere": _AMPERE_DECODE, "ada": _ADA_DECODE}

_INTERPRETER_DECODE = DecodeTuning(tile=64, num_warps=4, num_stages=1, ctas_per_sm=1, fan_in=4)

# (head block, bytes of a query element) -> tuning. On sm_90 the products are wgmma from 64 rows to a warpgroup on.
_PREFILL: dict[tuple[int, int], PrefillTuning] = {
    (64, 2): PrefillTuning(rows=128, tile=64, num_warps=4, num_stages=3),
    (64, 4): PrefillTuning(rows=32, tile=32, num_warps=4, num_stages=2),
    (128, 2): PrefillTuning(rows=128, tile=64, num_warps=8, num_stages=3),
    (128, 4): PrefillTuning(rows=32, tile=16, num_warps=4, num_stages=2),
    (256, 2): PrefillTuning(rows=64, tile=64, num_warps=8, num_stages=2),
    (256, 4): PrefillTuning(rows=32, tile=16, num_warps=8, num_stages=2),
}

_INTERPRETER_PREFILL = PrefillTuning(rows=256, tile=64, num_warps=4, num_stages=1)

# What the tables above would need more than the 99 KB of shared memory (64 KB on CDNA) for.
_SMALL_PREFILL: dict[tuple[ArchFamily, int, int], PrefillTuning] = {
    ("ampere", 256, 2): PrefillTuning(rows=64, tile=32, num_warps=8, num_stages=2),
    ("ada", 128, 2): PrefillTuning(rows=128, tile=64, num_warps=8, num_stages=2),  # 114 KB with three and a window
    ("ada", 256, 2): PrefillTuning(rows=64, tile=32, num_warps=8, num_stages=2),
    ("ada", 256, 4): PrefillTuning(rows=16, tile=16, num_warps=4, num_stages=1),
    ("cdna", 128, 2): PrefillTuning(rows=128, tile=64, num_warps=8, num_stages=1),
    ("cdna", 256, 2): PrefillTuning(rows=64, tile=32, num_warps=8, num_stages=1),
}


def decode_tuning(head_dim: int, kv_dtype: torch.dtype, family: ArchFamily) -> DecodeTuning:
    """The decode kernel's row of the table for KV of `kv_dtype`."""
    if family == "interpreter":
        return _INTERPRETER_DECODE
    tuning = _SMALL_DECODE.get(family, _DECODE)[max(64, head_block(head_dim)), kv_dtype.itemsize]
    # CDNA's pipeliner keeps tiles in registers and 64 KB of shared memory.
    return replace(tuning, num_stages=2) if family == "cdna" else tuning


def prefill_tuning(head_dim: int, q_dtype: torch.dtype, family: ArchFamily) -> PrefillTuning:
    """The prefill kernel's row of the table for queries of `q_dtype`."""
    if family == "interpreter":
        return _INTERPRETER_PREFILL
    key = (max(64, head_block(head_dim)), q_dtype.itemsize)
    return _SMALL_PREFILL.get((family, *key), _PREFILL[key])
