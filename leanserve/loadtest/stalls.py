"""How long one user's prompt stops another user's stream."""

from collections.abc import Sequence

import msgspec
import numpy as np

from leanserve.loadtest.record import Record

__all__ = ["Stall", "find_longest_stall"]


class Stall(msgspec.Struct, frozen=True):
    """A gap in one stream while another request was in prefill."""

    gap_ms: float
    stream: int
    """Index of the request that waited."""
    token: int
    """Which of its chunks came late, from 1."""
    prefill: int
    """Index of the request in prefill."""
    prefill_tokens: int
    typical_gap_ms: float
    """Median of all gaps that overlap no such prefill; 0 where there is none."""


def find_longest_stall(records: Sequence[Record]) -> Stall | None:
    """Against prompts of at least half the longest prompt's tokens."""
    timed = [r for r in records if r.ttft_ms is not None]
    if not timed:
        return None
    longest = max(r.context_tokens for r in timed)
    prefills = [r for r in timed if 2 * r.context_tokens >= longest]
    begun_ms = np.array([r.intended_s * 1000 + r.client_delay_ms for r in prefills])
    first_token_ms = np.array([r.intended_s * 1000 + (r.ttft_ms or 0) for r in prefills])
    worst: tuple[float, Record, int, Record] | None = None
    calm: list[float] = []
    for stream in timed:
        at_ms = stream.intended_s * 1000 + np.array(stream.chunk_ms)
        starts, ends = at_ms[:-1], at_ms[1:]
        gaps = ends - starts
        overlapped = np.zeros(len(gaps), bool)
        for near in np.flatnonzero((begun_ms < at_ms[-1]) & (first_token_ms > at_ms[0])):
            other = prefills[near]
            meets = (starts < first_token_ms[near]) & (ends > begun_ms[near])
            if other is stream or not meets.any():
                continue
            overlapped |= meets
            place = int(np.argmax(np.where(meets, gaps, -1.0)))
            if worst is None or gaps[place] > worst[0]:
                worst = (float(gaps[place]), stream, place, other)
        calm += gaps[~overlapped].tolist()
    if worst is None:
        return None
    gap_ms, stream, place, other = worst
    typical = float(np.median(calm)) if calm else 0.0
    return Stall(gap_ms, stream.index, place + 2, other.index, other.context_tokens, typical)
