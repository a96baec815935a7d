"""What requests took, noted as their messages pass. Counts and times only: knows no text, no token and no format."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from leanserve.contracts.messages import StepReport

__all__ = ["Histogram", "Phase", "RequestStatistics", "RequestTimes"]

Phase = Literal["body", "queued", "prefill", "decode"]
"""Where a request stands: still arriving, waiting for its first step, in its prompt, or past its first token."""


def _scale(lowest: float, highest: float) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... from `lowest` (a power of ten) to `highest`."""
    bounds: list[float] = []
    decade = lowest
    while decade <= highest:
        bounds += [float(f"{decade * step:.12g}") for step in (1, 2, 5) if decade * step <= highest]
        decade *= 10
    return tuple(bounds)


_SECONDS = _scale(0.001, 5000.0)
_TOKENS = _scale(1, 2_000_000)


class Histogram:
    """Counts by bucket. `prometheus_client` takes 1.5 us under a lock for what is 0.3 us here, once for every token."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        """Upper ends of the buckets, which belong to them; one more bucket holds what is above."""
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class RequestTimes:
    """One request's life in seconds of `time.perf_counter`."""

    __slots__ = (
        "arrived_at",
        "engine_lost_at",
        "first_token_at",
        "last_token_at",
        "output_tokens",
        "prompt_tokens",
        "resumed_at",
        "scheduled_at",
        "submitted_at",
    )

    def __init__(self, arrived_at: float, prompt_tokens: int, submitted_at: float | None = None) -> None:
        self.arrived_at = arrived_at
        self.submitted_at = arrived_at if submitted_at is None else submitted_at
        """When it was read, tokenized and checked."""
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at = arrived_at
        self.prompt_tokens = prompt_tokens
        self.output_tokens = 0
        self.engine_lost_at: tuple[float, ...] = ()
        """When an engine died with it, and it waited for the next one ..."""
        self.resumed_at: tuple[float, ...] = ()
        """... and when that one got it."""

    @property
    def phase(self) -> Phase:
        if self.scheduled_at is None:
            return "queued"
        return "prefill" if self.first_token_at is None else "decode"


class RequestStatistics:
    """Everything that is counted about requests, since start."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.cached_prompt_tokens = 0
        self.finished: Counter[str] = Counter()
        """By finish reason: stop, length, abort, error."""
        self.time_to_first_token_s = Histogram(_SECONDS)
        self.inter_token_s = Histogram(_SECONDS)
        self.per_output_token_s = Histogram(_SECONDS)
        self.end_to_end_s = Histogram(_SECONDS)
        self.queue_s = Histogram(_SECONDS)
        self.prefill_s = Histogram(_SECONDS)
        self.decode_s = Histogram(_SECONDS)
        self.inference_s = Histogram(_SECONDS)
        self.request_prompt_tokens = Histogram(_TOKENS)
        self.request_generation_tokens = Histogram(_TOKENS)
        self.step_prefill_tokens = 0
        self.step_decode_tokens = 0
        self.step_part_s: dict[str, float] = dict.fromkeys(("schedule", "forward", "sample", "combine"), 0.0)
        """Seconds of all steps on rank 0, by what they went to; combine is a part of forward and sample."""
        self.step_s = Histogram(_SECONDS)
        self._step_began_at = 0.0
        self._heard_at = 0.0

    def reported(self, report: StepReport) -> None:
        """The engine says what a step took."""
        times = report.times
        self.step_prefill_tokens += report.prefill_tokens
        self.step_decode_tokens += report.decode_rows
        for part, took_s in (
            ("schedule", report.schedule_s),
            ("forward", times.forward_s),
            ("sample", times.sample_s),
            ("combine", times.combine_s),
        ):
            self.step_part_s[part] += took_s
        self.step_s.observe(report.step_s)

    def submitted(self, arrived_at: float | None, prompt_tokens: int) -> RequestTimes:
        """A request goes to the engine; `arrived_at` is when its first byte was seen, None is now."""
        now = time.perf_counter()
        return RequestTimes(now if arrived_at is None else arrived_at, prompt_tokens, now)

    def step(self) -> float:
        """A step's outputs are here. Returns the time, for `scheduled` and `delivered`.

        The engine computes one step after the other, so this one began when the last one's outputs came, or later.
        """
        self._step_began_at, self._heard_at = self._heard_at, time.perf_counter()
        return self._heard_at

    def scheduled(self, times: RequestTimes) -> None:
        """A request was part of the step that just ended."""
        if times.scheduled_at is None:
            times.scheduled_at = max(times.arrived_at, self._step_began_at)
            self.queue_s.observe(times.scheduled_at - times.arrived_at)

    def delivered(self, times: RequestTimes, num_tokens: int, cached_tokens: int, now: float) -> None:
        """A request got tokens in that step."""
        self.generation_tokens += num_tokens
        times.output_tokens += num_tokens
        if times.first_token_at is not None:
            self.inter_token_s.observe(now - times.last_token_at)
        else:
            self.scheduled(times)
            assert times.scheduled_at is not None
            times.first_token_at = now
            self.prompt_tokens += times.prompt_tokens
            self.cached_prompt_tokens += cached_tokens
            self.time_to_first_token_s.observe(now - times.arrived_at)
            self.prefill_s.observe(now - times.scheduled_at)
        times.last_token_at = now

    def ended(self, times: RequestTimes, reason: str) -> None:
        """A request is over: by itself, or because somebody stopped it (`abort`) or something failed (`error`)."""
        self.finished[reason] += 1
        self.request_prompt_tokens.observe(times.prompt_tokens)
        self.request_generation_tokens.observe(times.output_tokens)
        if times.first_token_at is None or times.scheduled_at is None:
            return
        self.end_to_end_s.observe(times.last_token_at - times.arrived_at)
        self.inference_s.observe(times.last_token_at - times.scheduled_at)
        self.decode_s.observe(times.last_token_at - times.first_token_at)
        if times.output_tokens > 1:
            self.per_output_token_s.observe((times.last_token_at - times.first_token_at) / (times.output_tokens - 1))
