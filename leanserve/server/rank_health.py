"""What every rank last said of itself, and what is wrong with it. Judges by this process's clock alone."""

import os
from dataclasses import dataclass
from pathlib import Path

from leanserve.contracts.machine import this_machine
from leanserve.contracts.messages import Pulse

__all__ = ["HeardPulse", "RankHealth"]


@dataclass(frozen=True, slots=True)
class HeardPulse:
    """A rank's newest pulse, and when it came."""

    pulse: Pulse
    heard_at: float


class RankHealth:
    """The ranks of one attempt.

    Args:
        step_timeout_s: how long a step, or the silence of a rank, may last.
    """

    def __init__(self, step_timeout_s: float) -> None:
        self.step_timeout_s = step_timeout_s
        self.ranks: dict[int, HeardPulse] = {}
        """By rank: those heard of since the attempt began."""

    def hear(self, pulse: Pulse, now: float) -> None:
        self.ranks[pulse.rank] = HeardPulse(pulse, now)

    def forget(self) -> None:
        """The attempt is over."""
        self.ranks.clear()

    def gone(self) -> list[str]:
        """Ranks of this machine whose processes have ended."""
        here = this_machine()
        pulses = [heard.pulse for _, heard in sorted(self.ranks.items())]
        return [f"rank {p.rank} (pid {p.pid})" for p in pulses if p.host == here and not _is_running(p.pid)]

    def report(self, now: float) -> list[dict[str, object]]:
        """Of every rank: its newest step, how long the current one has run, and the age of its pulse."""
        return [
            {
                "rank": rank,
                "pid": heard.pulse.pid,
                "step": heard.pulse.step,
                "busy_s": round(heard.pulse.busy_s, 3),
                "age_s": round(now - heard.heard_at, 3),
            }
            for rank, heard in sorted(self.ranks.items())
        ]

    def troubled(self, now: float, *, patience_s: float = 0.0) -> dict[int, str]:
        """What is wrong, by rank: it is silent, or its step takes too long.

        Args:
            patience_s: beyond the step timeout.
        """
        limit_s = self.step_timeout_s + patience_s
        troubled: dict[int, str] = {}
        for rank, heard in sorted(self.ranks.items()):
            pulse, silent_s = heard.pulse, now - heard.heard_at
            if silent_s > limit_s:
                troubled[rank] = f"rank {rank} (pid {pulse.pid}) has been silent for {silent_s:.1f} s"
            elif pulse.busy_s and pulse.busy_s + silent_s > limit_s:
                troubled[rank] = (
                    f"rank {rank} (pid {pulse.pid}) has not completed the step after {pulse.step} in "
                    f"{pulse.busy_s + silent_s:.1f} s"
                )
        return troubled


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's, or no /proc
        return True
