"""What is known of one HTTP request while it is served, for the log, the metrics and the traces."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.types import Scope

from leanserve.server.statistics import Phase, RequestTimes

if TYPE_CHECKING:
    from leanserve.server.answer import Answer

__all__ = ["PROBE_PATHS", "RequestFacts", "facts_of"]

PROBE_PATHS = frozenset({"/health", "/ready", "/ping"})
"""Asked every few seconds by whoever looks after the server; "not yet" is an answer like another."""


@dataclass(slots=True)
class RequestFacts:
    request_id: str
    """The client's own, if it is one that may be echoed, or ours."""
    arrived_at: float
    """By `time.perf_counter`."""
    answer: "Answer | None" = None
    """Of a generation that went to the engine. It knows the prompt: tell its counts, names and settings, no words."""
    times: Mapping[str, RequestTimes] = field(default_factory=dict[str, RequestTimes])
    """Of the answer's choices, by the name that each has at the engine."""
    left_in: Phase | None = None
    """The client went away before its answer was complete, in this phase."""
    key: str | None = None
    """The beginning of the digest of the key that was shown: tells keys apart and nothing else."""
    error_code: str | None = None
    """Of the error that was answered, if one was."""
    failure: str | None = None
    """Why it failed, where that is not the client's doing; in our own words."""

    @property
    def answer_id(self) -> str | None:
        """What the engine calls it, with a number behind for each choice."""
        return None if self.answer is None else self.answer.id

    @property
    def prompt_tokens(self) -> int | None:
        return None if self.answer is None else self.answer.prompt_tokens

    @property
    def completion_tokens(self) -> int | None:
        """Those that the client was to be sent."""
        return None if self.answer is None else self.answer.completion_tokens


def facts_of(scope: Scope) -> RequestFacts:
    """The facts of a request that `RequestBoundary` has let in."""
    return scope["leanserve"]
