"""From records to figures. Every figure has its formula in FORMULAS; the command prints both."""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from leanserve.loadtest.fits import Line, PositionBin, fit_decode, fit_prefill, gaps_by_position
from leanserve.loadtest.record import Record
from leanserve.loadtest.slo import Slo, tpot_ms
from leanserve.loadtest.stalls import Stall, find_longest_stall

__all__ = ["FORMULAS", "Distribution", "Measures", "distribution", "measure"]

FORMULAS = {
    "ttft_ms": "first chunk with a token - intended start",
    "first_byte_ms": "first byte of the response - intended start",
    "itl_ms": "between neighbouring chunks with tokens, all streams pooled",
    "tpot_ms": "(last token - first token) / (output tokens - tokens in the first chunk), per request",
    "e2e_ms": "last token - intended start",
    "client_delay_ms": "this client's begin - intended start, of all requests; inside all latencies",
    "connect_ms": "TCP and TLS, of all requests that connected; inside all latencies",
    "duration_s": "last end - first intended start",
    "requests_per_s": "successful requests / duration",
    "goodput_rps": "successful requests that keep every SLO / duration",
    "slo_share": "successful requests that keep every SLO / requests that were neither cancelled nor read slowly",
    "input_tokens_per_s": "prompt tokens of successful requests / duration",
    "output_tokens_per_s": "output tokens of successful requests / duration",
    "tokens_per_chunk": "tokens of all chunks / chunks that carry tokens; 1 where the server sends no ids",
    "prefill": "TTFT = queue + slope x uncached prompt tokens / 1000, Theil-Sen fit",
    "decode": "gap = base + slope x context position / 1000, least squares over medians of equal bins",
    "longest_stall": "longest gap of a running stream that overlaps another request's [sent, first token] "
    "where that prompt is at least half the longest",
    "cached_tokens": "prompt tokens found in a prefix cache, by the server's usage",
    "client_lag_ms": "how late this client's 10 ms timer fired",
    "client_cpu": "CPU seconds of this client / duration; it has one core",
}
"""What each figure is. Percentiles interpolate linearly; latencies are those of successful requests,
unless it says otherwise."""


class Distribution(msgspec.Struct, frozen=True):
    """Of a sample; all zero where it is empty."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class Measures(msgspec.Struct, kw_only=True):
    """All figures of a run."""

    requests: int
    succeeded: int
    errors: int
    errors_by_kind: dict[str, int]
    cancelled: int
    slow_readers: int
    short_outputs: int
    """Successful, but with fewer tokens than asked; needle questions apart, which end by themselves."""
    length_mismatches: int
    """The server counted another prompt length than was asked for."""
    uncounted: int
    """No usage came: output tokens are counted by chunks."""
    ttft_ms: Distribution
    first_byte_ms: Distribution
    itl_ms: Distribution
    tpot_ms: Distribution
    e2e_ms: Distribution
    client_delay_ms: Distribution
    connect_ms: Distribution
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None
    """None where the server does not tell."""
    tokens_per_chunk: float
    duration_s: float
    requests_per_s: float
    goodput_rps: float
    slo_share: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    prefill: Line | None
    """None where prompt lengths do not differ enough to tell a slope."""
    decode: Line | None
    decode_by_position: list[PositionBin]
    longest_stall: Stall | None


def distribution(values: Iterable[float]) -> Distribution:
    """Mean, percentiles by linear interpolation, and maximum."""
    sample = np.fromiter(values, float)
    if not len(sample):
        return Distribution()
    p50, p90, p95, p99 = (float(found) for found in np.percentile(sample, (50, 90, 95, 99)))
    return Distribution(len(sample), float(sample.mean()), p50, p90, p95, p99, float(sample.max()))


def measure(records: Sequence[Record], slo: Slo) -> Measures:
    """Every figure that requests alone give."""
    good = [record for record in records if record.outcome == "ok"]
    counted = [record for record in records if record.outcome not in ("cancelled", "slow")]
    duration_s = max((r.end_s for r in records), default=0.0) - min((r.intended_s for r in records), default=0.0)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    input_tokens = sum(record.context_tokens for record in good)
    output_tokens = sum(record.output_tokens or 0 for record in good)
    cached = [record.cached_tokens for record in good if record.cached_tokens is not None]
    chunks = sum(len(record.chunk_ms) for record in good)
    within = sum(slo.is_met_by(record) for record in counted)
    by_kind = Counter(record.error_kind or "unknown" for record in records if record.outcome == "error")
    bins = gaps_by_position(good)
    return Measures(
        requests=len(records),
        succeeded=len(good),
        errors=sum(by_kind.values()),
        errors_by_kind=dict(by_kind.most_common()),
        cancelled=sum(record.outcome == "cancelled" for record in records),
        slow_readers=sum(record.outcome == "slow" for record in records),
        short_outputs=sum((r.output_tokens or 0) < r.output_tokens_asked for r in good if r.needle is None),
        length_mismatches=sum(record.context_tokens != record.prompt_tokens_asked for record in good),
        uncounted=sum(not record.usage_told for record in good),
        ttft_ms=distribution(record.ttft_ms for record in good if record.ttft_ms is not None),
        first_byte_ms=distribution(record.first_byte_ms for record in good if record.first_byte_ms is not None),
        itl_ms=distribution(gap for record in good for gap in np.diff(record.chunk_ms)),
        tpot_ms=distribution(value for record in good if (value := tpot_ms(record)) is not None),
        e2e_ms=distribution(record.e2e_ms for record in good if record.e2e_ms is not None),
        client_delay_ms=distribution(record.client_delay_ms for record in records),
        connect_ms=distribution(record.connect_ms for record in records if record.connect_ms is not None),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(cached) if cached else None,
        tokens_per_chunk=sum(sum(record.chunk_tokens) for record in good) / chunks if chunks else 0.0,
        duration_s=duration_s,
        requests_per_s=len(good) * per_s,
        goodput_rps=within * per_s,
        slo_share=within / len(counted) if counted else 0.0,
        input_tokens_per_s=input_tokens * per_s,
        output_tokens_per_s=output_tokens * per_s,
        prefill=fit_prefill(good),
        decode=fit_decode(bins),
        decode_by_position=bins,
        longest_stall=find_longest_stall([r for r in records if r.outcome != "slow"]),
    )
