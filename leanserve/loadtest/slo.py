"""Service level objectives: what a request must keep to count."""

import re
from dataclasses import dataclass

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.record import Record

__all__ = ["Slo", "tpot_ms"]

_LIMIT = re.compile(r"(ttft|tpot|e2e)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)")


@dataclass(frozen=True)
class Slo:
    """Upper limits in ms; none at all is met by every request that succeeds."""

    limits_ms: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read `ttft=2s,tpot=50ms,e2e=30s`, in any selection.

        Raises:
            ConfigError: it is not of this form.
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            if not (match := _LIMIT.fullmatch(part.strip())):
                raise ConfigError(f"--slo: {part!r} is not one of ttft=, tpot= or e2e= with a time such as 2s or 50ms")
            found[match[1]] = float(match[2]) * (1000 if match[3] == "s" else 1)
        return cls(tuple(found.items()))

    def is_met_by(self, record: Record) -> bool:
        """The request succeeded within every limit. A single token has no TPOT, and keeps any."""
        if record.outcome != "ok":
            return False
        seen = {"ttft": record.ttft_ms, "tpot": tpot_ms(record), "e2e": record.e2e_ms}
        return all((value := seen[name]) is None or value <= limit for name, limit in self.limits_ms)

    def __str__(self) -> str:
        return ", ".join(f"{name} <= {limit:g} ms" for name, limit in self.limits_ms) or "none"


def tpot_ms(record: Record) -> float | None:
    """Time per output token after the first chunk; None where nothing came after it."""
    if record.ttft_ms is None or record.last_token_ms is None or not record.output_tokens:
        return None
    later_tokens = record.output_tokens - record.chunk_tokens[0]
    if later_tokens < 1 or len(record.chunk_ms) < 2:
        return None
    return (record.last_token_ms - record.ttft_ms) / later_tokens
