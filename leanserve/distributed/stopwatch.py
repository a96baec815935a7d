"""How long a device takes for some stretches of work, found out without making the host wait for it."""

import time

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """`with stopwatch:` around the work, as often as one likes; stretches do not nest.

    On a GPU the work has only been asked for when the `with` ends, so an event stands at each end of it on the current
    stream, and `take_s` counts the stretches that the device is known to have done; the others count next time. What a
    CUDA graph captures is not counted: it runs when the graph does, which nobody tells the watch.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._started_s = 0.0
        self._host_s = 0.0
        self._open: torch.cuda.Event | None = None
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """The oldest first."""
        self._spare: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        if not self._on_gpu:
            self._started_s = time.perf_counter()
        elif not torch.cuda.is_current_stream_capturing():
            self._open = self._mark()

    def __exit__(self, *_: object) -> None:
        if not self._on_gpu:
            self._host_s += time.perf_counter() - self._started_s
        elif self._open is not None:
            self._pending.append((self._open, self._mark()))
            self._open = None

    def take_s(self) -> float:
        """Seconds of all stretches that are done and were not told before."""
        seconds, self._host_s = self._host_s, 0.0
        num_done = 0
        for start, end in self._pending:
            if not end.query():
                break
            seconds += start.elapsed_time(end) / 1e3
            self._spare += (start, end)
            num_done += 1
        del self._pending[:num_done]
        return seconds

    def _mark(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
