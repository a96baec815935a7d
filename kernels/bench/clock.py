"""Timing: CUDA-graph replays measured by events, wall time on the CPU, and the read-only yardstick for bandwidth."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Step = Callable[[], object]

ROUNDS = 15
"""Timed rounds, of which the median is taken."""
ROUND_S = 2e-3
"""A round repeats its steps until it lasts about this long, so that the clock's grain does not show."""


def median_us(steps: Sequence[Step], device: torch.device) -> float:
    """Microseconds per step: the median over rounds. The steps of a round run one after the other and differ in their
    inputs only, so that together they outgrow the cache."""
    return _graph_median_us(steps) if device.type == "cuda" else _wall_median_us(steps)


def _graph_median_us(steps: Sequence[Step]) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step() for step in steps]
    once = _event_us(graph.replay, 1)
    replays = max(1, min(1000, math.ceil(ROUND_S * 1e6 / max(once, 1.0))))
    rounds = [_event_us(graph.replay, replays) for _ in range(ROUNDS)]
    del kept
    return statistics.median(rounds) / len(steps)


def _event_us(run: Step, times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / times


def eager_us(run: Step, device: torch.device) -> float:
    """Median microseconds of one call of twenty, outside any graph, launch cost included."""
    run()
    laps = []
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        laps.append((time.perf_counter() - start) * 1e6)
    return statistics.median(laps)


def _wall_median_us(steps: Sequence[Step]) -> float:
    for step in steps:
        step()
    laps = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        repeats = 0
        while repeats == 0 or time.perf_counter() - start < ROUND_S:
            for step in steps:
                step()
            repeats += 1
        laps.append((time.perf_counter() - start) / repeats)
    return statistics.median(laps) * 1e6 / len(steps)


def cache_bytes(device: torch.device) -> int:
    """The last-level cache, which inputs are rotated to outgrow; 32 MB is taken for a CPU."""
    if device.type != "cuda":
        return 32 << 20
    return torch.cuda.get_device_properties(device).L2_cache_size


def read_gbps(num_bytes: int, device: torch.device) -> float:
    """Gigabytes per second of a kernel that reads `num_bytes` once and writes next to nothing."""
    pool = torch.zeros(num_bytes // 4, dtype=torch.int32, device=device)
    if device.type == "cuda":
        from read_kernel import reader

        read = reader(pool)
    else:
        read = pool.max
    # One buffer that outgrows the cache is rotation enough.
    assert num_bytes > 2 * cache_bytes(device)
    return num_bytes / median_us([read], device) / 1e3
