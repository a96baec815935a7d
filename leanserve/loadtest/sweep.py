"""The same workload at one load after another: where a server bends, and how much it takes within an SLO."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.measures import Measures

__all__ = ["LoadKind", "Sweep", "SweepStep", "parse_sweep", "sweep_of"]

LoadKind = Literal["rate", "concurrency"]
MIN_SLO_SHARE = 0.9
"""A load meets an SLO when at least this share of its requests does."""


class SweepStep(msgspec.Struct, frozen=True, kw_only=True):
    """One load of a sweep."""

    load: float
    """Requests/s, or requests at once."""
    measures: Measures
    meets_slo: bool


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """All steps, by rising load."""

    kind: LoadKind
    steps: list[SweepStep]
    knee: float
    """The load with the most power: output tokens/s over mean end-to-end latency (Kleinrock 1979)."""
    best: float | None
    """The highest load that meets the SLO, as all lower ones do; None if the lowest does not."""


def parse_sweep(text: str) -> tuple[LoadKind, tuple[float, ...]]:
    """Read rate=1,2,4 or concurrency=1,2,4.

    Raises:
        ConfigError: it is not of this form.
    """
    kind, _, values = text.partition("=")
    try:
        loads = tuple(sorted({float(value) for value in values.split(",")}))
    except ValueError:
        loads = ()
    if kind not in ("rate", "concurrency") or not loads or loads[0] <= 0:
        raise ConfigError(f"--sweep is {text!r}; write rate=1,2,4 or concurrency=1,2,4, numbers above 0")
    if kind == "concurrency" and any(load != int(load) for load in loads):
        raise ConfigError(f"--sweep is {text!r}; a concurrency is a whole number")
    return ("rate" if kind == "rate" else "concurrency"), loads


def sweep_of(kind: LoadKind, measured: Sequence[tuple[float, Measures]]) -> Sweep:
    """Judge measured loads, given by rising load."""
    steps = [
        SweepStep(load=load, measures=measures, meets_slo=measures.slo_share >= MIN_SLO_SHARE)
        for load, measures in measured
    ]

    def power(step: SweepStep) -> float:
        latency_ms = step.measures.e2e_ms.mean
        return step.measures.output_tokens_per_s / latency_ms if latency_ms else 0.0

    best: float | None = None
    for step in steps:
        if not step.meets_slo:
            break
        best = step.load
    return Sweep(kind=kind, steps=steps, knee=max(steps, key=power).load, best=best)
