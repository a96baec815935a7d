"""How times grow with tokens: the first token's with the prompt, the later ones' with the context."""

from collections.abc import Sequence

import msgspec
import numpy as np

from leanserve.loadtest.record import Record

__all__ = ["Line", "PositionBin", "fit_decode", "fit_prefill", "gaps_by_position"]

_BINS = 24
_MAX_PAIRS = 100_000


class Line(msgspec.Struct, frozen=True):
    """A fitted straight line, x in thousands of tokens."""

    at_zero_ms: float
    per_1k_tokens_ms: float


class PositionBin(msgspec.Struct, frozen=True):
    """Gaps before tokens whose context had from `first` to `last` tokens."""

    first: int
    last: int
    position: float
    """Median of the gaps' own positions."""
    gaps: int
    p10_ms: float
    p50_ms: float
    p90_ms: float


def fit_prefill(good: Sequence[Record]) -> Line | None:
    """Theil-Sen: the median slope over pairs of requests, which a few queued ones cannot bend."""
    timed = [(r.context_tokens - (r.cached_tokens or 0), r.ttft_ms) for r in good if r.ttft_ms is not None]
    tokens = np.array([tokens for tokens, _ in timed], float)
    ttft_ms = np.array([ttft for _, ttft in timed], float)
    if len(timed) < 4 or tokens.max() < 1.5 * max(1.0, tokens.min()):
        return None
    first, second = np.triu_indices(len(timed), 1)
    if len(first) > _MAX_PAIRS:
        chosen = np.random.default_rng(0).choice(len(first), _MAX_PAIRS, replace=False)
        first, second = first[chosen], second[chosen]
    differ = tokens[first] != tokens[second]
    first, second = first[differ], second[differ]
    slope = float(np.median((ttft_ms[first] - ttft_ms[second]) / (tokens[first] - tokens[second])))
    return Line(float(np.median(ttft_ms - slope * tokens)), slope * 1000)


def gaps_by_position(good: Sequence[Record]) -> list[PositionBin]:
    """Bins of equal width over the positions of all gaps; empty ones are left out."""
    positions = [record.context_tokens + np.cumsum(record.chunk_tokens)[:-1] for record in good if record.chunk_ms]
    gaps = [np.diff(record.chunk_ms) for record in good if record.chunk_ms]
    if not positions or not (position := np.concatenate(positions)).size:
        return []
    gap_ms = np.concatenate(gaps)
    low, high = int(position.min()), int(position.max())
    width = max(1, -(-(high - low + 1) // _BINS))
    places = (position - low) // width
    found: list[PositionBin] = []
    for place in range(int(places.max()) + 1):
        inside = gap_ms[places == place]
        if inside.size:
            p10, p50, p90 = (float(value) for value in np.percentile(inside, (10, 50, 90)))
            first = low + place * width
            middle = float(np.median(position[places == place]))
            last = min(high, first + width - 1)
            found.append(PositionBin(first, last, middle, int(inside.size), p10, p50, p90))
    return found


def fit_decode(bins: Sequence[PositionBin]) -> Line | None:
    """Least squares over the medians; None where positions do not differ enough."""
    if len(bins) < 3 or bins[-1].last < 1.5 * bins[0].first:
        return None
    middles = [found.position / 1000 for found in bins]
    slope, at_zero = np.polyfit(middles, [found.p50_ms for found in bins], 1)
    return Line(float(at_zero), float(slope))
