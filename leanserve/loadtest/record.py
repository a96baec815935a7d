"""What is known of one request when it has ended: s from the run's start, ms from the request's intended start."""

from typing import Literal

import msgspec

__all__ = ["Outcome", "Record"]

Outcome = Literal["ok", "error", "cancelled", "slow"]
"""cancelled: by this client, on purpose. slow: read slowly, on purpose; its times are this client's own doing."""


class Record(msgspec.Struct, kw_only=True):
    """One request. A line of requests.jsonl."""

    index: int
    request_id: str
    """Sent as X-Request-Id, for the server's log."""
    conversation: int
    turn: int
    outcome: Outcome
    error_kind: str | None = None
    """A short word: connect, closed, timeout, http 503, stream ..."""
    error: str | None = None

    intended_s: float
    """When it should have started: by the schedule, or when its place in a closed loop came free."""
    client_delay_ms: float
    """How much later this client began: its own fault, and inside every latency."""
    connect_ms: float | None = None
    first_byte_ms: float | None = None
    """From the intended start, as the three below."""
    ttft_ms: float | None = None
    """To the first chunk with a token."""
    last_token_ms: float | None = None
    e2e_ms: float | None = None
    """To the last token's arrival."""
    chunk_ms: list[float] = []
    """Every chunk that carries tokens, from the intended start."""
    chunk_tokens: list[int] = []
    """Tokens in each; 1 where the server sends no ids."""

    prompt_tokens_asked: int
    output_tokens_asked: int
    prompt_tokens: int | None = None
    """By the server's count."""
    output_tokens: int | None = None
    """By the server's count; by chunks where it gives none."""
    cached_tokens: int | None = None
    usage_told: bool = False
    finish_reason: str | None = None
    text: str = ""
    token_ids: list[int] | None = None
    needle: str | None = None
    needle_found: bool | None = None

    @property
    def context_tokens(self) -> int:
        """Prompt tokens: as counted by the server, else as asked."""
        return self.prompt_tokens if self.prompt_tokens is not None else self.prompt_tokens_asked

    @property
    def end_s(self) -> float:
        """When the last thing known of it happened."""
        last_ms = max(self.e2e_ms or 0, self.first_byte_ms or 0, self.client_delay_ms)
        return self.intended_s + last_ms / 1000
