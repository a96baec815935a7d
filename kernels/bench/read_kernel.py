"""The yardstick for bandwidth on a GPU: a kernel that reads everything once and writes one number per program."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
PROGRAMS_PER_SM = 4


@triton.jit
def read_kernel(pool_ptr, out_ptr, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    largest = tl.zeros((BLOCK,), tl.int32)
    for block in tl.range(program, blocks, tl.num_programs(0), num_stages=4):
        start = pool_ptr + block * BLOCK
        largest = tl.maximum(largest, tl.load(start + tl.arange(0, BLOCK), eviction_policy="evict_first"))
    tl.store(out_ptr + program, tl.max(largest, axis=0))


def reader(pool: Tensor) -> Callable[[], object]:
    """A step that reads all of pool: int32, a multiple of 4096 elements, fewer than 2^31."""
    if pool.device.type == "cuda":
        programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(pool.device).multi_processor_count
    else:
        programs = PROGRAMS_PER_SM  # in the interpreter
    out = torch.empty(programs, dtype=torch.int32, device=pool.device)

    def read() -> Tensor:
        read_kernel[(programs,)](pool, out, pool.numel() // BLOCK, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True)
        return out

    return read
