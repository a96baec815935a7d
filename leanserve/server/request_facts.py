"""What is known of one HTTP request while it is served, for the log and the metrics. Never what it says."""

from dataclasses import dataclass

from starlette.types import Scope

__all__ = ["RequestFacts", "facts_of"]


@dataclass(slots=True)
class RequestFacts:
    request_id: str
    """The client's own, if it is one that may be echoed, or ours."""
    arrived_at: float
    """By `time.perf_counter`."""
    answer_id: str | None = None
    """What the engine calls it, with a number behind for each choice."""
    key: str | None = None
    """The beginning of the digest of the key that was shown: tells keys apart and nothing else."""
    error_code: str | None = None
    """Of the error that was answered, if one was."""
    failure: str | None = None
    """Why it failed, where that is not the client's doing; in our own words."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def facts_of(scope: Scope) -> RequestFacts:
    """The facts of a request that `RequestBoundary` has let in."""
    return scope["leanserve"]
