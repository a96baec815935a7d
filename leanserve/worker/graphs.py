"""Decode steps as CUDA graphs: captured once for a few batch sizes, replayed for every step that is decode alone.

A replay launches everything of a step, collectives included, with one call. It reads what the decode rows' buffers hold
then, and the attention plan is made on the device, so one graph serves all lengths and all page tables. A batch between
two sizes runs as the larger one: rows that are not in use attend to nothing and store nothing.
"""

from collections.abc import Callable

import torch

from leanserve.distributed.ranks import Ranks

__all__ = ["CudaCapture", "DecodeGraphs", "capture_sizes", "supports_graphs"]


def capture_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes worth a graph of their own, the last one `max_rows`: at most 8 rows too many below 64, 16 below 256,
    32 beyond."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


def supports_graphs(ranks: Ranks, attention: str) -> bool:
    """Whether decode steps can be captured: on a GPU, with Triton's kernels, and no bytes that go through the host."""
    return ranks.device.type == "cuda" and attention == "triton" and not ranks.stages_through_host


class CudaCapture:
    """Makes CUDA graphs that never run at the same time: their intermediate results share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do the work once, capture it, and return what does it again."""
        # Outside a graph first: kernels are compiled and loaded, libraries and channels between ranks set up.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (NCCL's watchdog among them) may ask CUDA for something meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class DecodeGraphs:
    """Graphs of a decode step for some batch sizes. Every rank captures the same sizes in the same order.

    Afterwards a step allocates nothing: all graphs share one buffer for their logits, too.

    Args:
        decode: returns the logits [B, V] of the first B decode rows, or None whatever B. It neither waits for the
            device nor reads from it, and launches the same for a size whatever the rows hold.
        sizes: rising.
        capture: `CudaCapture`, or what does as it does.
        progress: told (done, total) sizes.
    """

    def __init__(
        self,
        decode: Callable[[int], torch.Tensor | None],
        sizes: tuple[int, ...],
        capture: Callable[[Callable[[], None]], Callable[[], None]],
        progress: Callable[[int, int], None],
    ) -> None:
        self.sizes = sizes
        self._logits_SV: torch.Tensor | None = None
        self._replays: dict[int, Callable[[], None]] = {}
        progress(0, len(sizes))
        # The largest first: what it needs holds every other.
        for done, size in enumerate(reversed(sizes), start=1):
            self._replays[size] = capture(lambda size=size: self._decode_into_buffer(decode, size))
            progress(done, len(sizes))

    def __call__(self, num_rows: int) -> torch.Tensor | None:
        """As `decode`. The logits are valid until the next call."""
        self._replays[min(size for size in self.sizes if size >= num_rows)]()
        return None if self._logits_SV is None else self._logits_SV[:num_rows]

    def release(self) -> None:
        """Let go of every graph; none can be replayed any more."""
        self._replays.clear()

    def _decode_into_buffer(self, decode: Callable[[int], torch.Tensor | None], size: int) -> None:
        logits_BV = decode(size)
        if logits_BV is None:
            return
        if self._logits_SV is None:  # before the first capture
            self._logits_SV = torch.empty_like(logits_BV)
        self._logits_SV[:size] = logits_BV
