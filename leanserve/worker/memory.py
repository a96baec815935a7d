"""How many bytes of KV cache a rank may hold, and what is said when it cannot have them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from leanserve.contracts.errors import ConfigError
from leanserve.worker.host_memory import available_host_bytes

__all__ = ["allocating", "kv_budget_bytes", "memory_per_rank", "num_pages"]

GIB = 1 << 30
CPU_KV_LIMIT_BYTES = 4 * GIB
CPU_KV_SHARE = 0.25
GPU_MEMORY_SHARE = 0.90
"""Of a GPU's memory, what weights, activations and KV may take together."""


def kv_budget_bytes(
    wanted: int | None, device: torch.device, *, ranks_on_host: int, ranks_on_device: int, activation_bytes: int
) -> int:
    """KV bytes of one rank, after the model is loaded.

    Args:
        wanted: the user's `--kv-memory` per rank, taken as it is.
        activation_bytes: what one step needs beside weights and KV on a GPU.
    """
    if wanted is not None:
        return wanted
    if device.type == "cpu":
        return int(min(CPU_KV_LIMIT_BYTES, available_host_bytes() * CPU_KV_SHARE)) // ranks_on_host
    free, total = torch.cuda.mem_get_info(device)
    spare = free - int(total * (1 - GPU_MEMORY_SHARE))
    return spare // ranks_on_device - activation_bytes


def memory_per_rank(device: torch.device, *, ranks_on_host: int, ranks_on_device: int) -> int:
    """Bytes that a rank has for weights, activations and KV together, before the model is loaded."""
    if device.type == "cpu":
        return available_host_bytes() // ranks_on_host
    _, total = torch.cuda.mem_get_info(device)
    return int(total * GPU_MEMORY_SHARE) // ranks_on_device


def num_pages(budget_bytes: int, page_bytes: int, page_tokens: int) -> int:
    """Whole pages in a budget.

    Raises:
        ConfigError: not even one fits.
    """
    pages = budget_bytes // page_bytes
    if pages < 1:
        raise ConfigError(
            f"KV memory of {max(budget_bytes, 0) / 2**20:.1f} MiB holds no page: a page of {page_tokens} tokens takes "
            f"{page_bytes / 2**20:.2f} MiB; raise --kv-memory, lower --page-tokens, or use more ranks"
        )
    return min(pages, 2**31 - 1)  # page ids are int32


@contextmanager
def allocating(what: str, *, instead: str) -> Iterator[None]:
    """Where there is no memory for what is allocated inside, that is said as an error that no restart mends: the next
    attempt would ask for the same.

    Args:
        what: is allocated, with its bytes.
        instead: what to do.

    Raises:
        ConfigError: there is no memory for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ConfigError(f"there is no memory for {what}; {instead} ({str(error).partition(chr(10))[0]})") from error


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """torch has an exception of its own for the caching allocator of a GPU alone."""
    said = ("DefaultCPUAllocator", "CUDA error: out of memory", "HIP error: out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)
