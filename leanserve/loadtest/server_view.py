"""What the server's own samples add up to."""

import msgspec

from leanserve.loadtest.scrape import ServerSamples

__all__ = ["ServerView", "view_server"]


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """The server's account of the run; None for what it does not tell."""

    source: str
    samples: int
    peak_running: float | None
    peak_waiting: float | None
    peak_kv_use: float | None
    """Share, 0 to 1."""
    peak_kv_per_rank: dict[str, float] | None
    """Of the sample in which the ranks together held most."""
    imbalance: float | None
    """In that sample, the fullest rank over the mean of all."""
    idle_at_end: bool
    """Nothing ran or waited, and no page was referenced, within seconds of the last request."""
    kv_per_rank_at_end: dict[str, float] | None
    preemptions: float | None
    """During the run, as the two below."""
    cache_queries: float | None
    cache_hits: float | None


def view_server(samples: ServerSamples) -> ServerView | None:
    """Sum up; None where the server tells nothing."""
    if samples.source is None or not samples.samples:
        return None
    taken = samples.samples
    first, last = taken[0], taken[-1]
    fullest = max((s.kv_per_rank for s in taken if s.kv_per_rank), key=lambda ranks: sum(ranks.values()), default=None)
    mean = sum(fullest.values()) / len(fullest) if fullest else 0.0
    return ServerView(
        source=samples.source,
        samples=len(taken),
        peak_running=_peak([s.running for s in taken]),
        peak_waiting=_peak([s.waiting for s in taken]),
        peak_kv_use=_peak([s.kv_use for s in taken]),
        peak_kv_per_rank=fullest,
        imbalance=max(fullest.values()) / mean if fullest and mean > 0 else None,
        idle_at_end=last.is_idle,
        kv_per_rank_at_end=last.kv_per_rank,
        preemptions=_grown(first.preemptions, last.preemptions),
        cache_queries=_grown(first.cache_queries, last.cache_queries),
        cache_hits=_grown(first.cache_hits, last.cache_hits),
    )


def _peak(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _grown(before: float | None, after: float | None) -> float | None:
    return None if after is None else after - (before or 0.0)
