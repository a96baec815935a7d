"""Decode steps as CUDA graphs: captured once for a few batch sizes, replayed for every step that is decode alone.

A replay launches everything of a step, collectives included, with one call. It reads what the decode rows' buffers hold
then, and the attention plan is made on the device, so one graph serves all lengths and all page tables. A batch between
two sizes runs as the larger one: rows that are not in use attend to nothing and store nothing.
"""

from collections.abc import Callable

import torch

from leanserve.distributed.ranks import Ranks

__all__ = ["DecodeGraphs", "capture_sizes", "supports_graphs"]


def capture_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes worth a graph of their own, the last one `max_rows`: at most 8 rows too many below 64, 16 below 256,
    32 beyond."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


def supports_graphs(ranks: Ranks, attention: str) -> bool:
    """Whether decode steps can be captured: on a GPU, with Triton's kernels, and no bytes that go through the host."""
    return ranks.device.type == "cuda" and attention == "triton" and not ranks.stages_through_host


class DecodeGraphs:
    """Graphs of `decode`, which returns the logits [B, V] of the first B decode rows, or None (on every size alike).

    Every rank captures the same sizes in the same order. Afterwards nothing is allocated: intermediate results live in
    one pool of memory that all graphs share, as they never run at once, and logits in one buffer.

    Args:
        decode: neither waits for the device nor reads from it, and launches the same for a size whatever the rows hold.
        sizes: rising.
        progress: told (done, total) sizes.
    """

    def __init__(
        self,
        decode: Callable[[int], torch.Tensor | None],
        sizes: tuple[int, ...],
        device: torch.device,
        progress: Callable[[int, int], None],
    ) -> None:
        self._sizes = sizes
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits_SV: torch.Tensor | None = None
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        progress(0, len(sizes))
        # The largest first: what it needs holds every other.
        for done, size in enumerate(reversed(sizes), start=1):
            # Outside a graph first: kernels are compiled and loaded, libraries and channels between ranks set up.
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                logits_BV = decode(size)
                if self._logits_SV is None and logits_BV is not None:
                    self._logits_SV = torch.empty_like(logits_BV)
                del logits_BV
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads (NCCL's watchdog, ZMQ) may touch CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                logits_BV = decode(size)
                if logits_BV is not None:
                    assert self._logits_SV is not None
                    self._logits_SV[:size] = logits_BV
                del logits_BV
            self._graphs[size] = graph
            progress(done, len(sizes))

    def __call__(self, num_rows: int) -> torch.Tensor | None:
        """As `decode`. The logits are valid until the next call."""
        self._graphs[min(size for size in self._sizes if size >= num_rows)].replay()
        return None if self._logits_SV is None else self._logits_SV[:num_rows]
