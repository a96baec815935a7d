"""What the front end was told: names, limits, times."""

import re
from dataclasses import dataclass

from leanserve.contracts.errors import ConfigError
from leanserve.server.tool_calls import ToolFormat

__all__ = ["ServerSettings"]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP face."""

    model_names: tuple[str, ...]
    """Names the model answers to; the first is the one in answers. Compared, never used as paths."""
    max_body_bytes: int = 16 << 20
    """Longest request body. A million token ids take about 7 MB."""
    body_timeout_s: float = 60.0
    """A request whose head has not arrived by then, or whose body so long after its head, is answered 408."""
    max_prompts: int = 128
    """Prompts in one request."""
    max_prompt_logprobs: int = 4_000_000
    """Log-probabilities of prompt tokens, and of the most likely ones beside them, in one answer."""
    max_live_requests: int = 4096
    """Prompts at the engine at once, running or waiting; more are answered 503."""
    max_live_prompt_tokens: int = 1 << 26
    """Tokens of those prompts together; they are kept here, 4 bytes each."""
    queue_timeout_s: float | None = None
    """A request that has not begun by then is answered 408; None: it may wait for ever."""
    request_timeout_s: float | None = None
    """A request that has not ended by then is stopped."""
    keep_alive_s: float = 15.0
    """A stream that is silent for so long gets a comment (proxies cut silent connections, often at 60 s)."""
    key_digests: tuple[bytes, ...] = ()
    """SHA-256 of the API keys, one of which every request must show; empty: nobody is asked."""
    max_requests_per_key: int | None = None
    """POSTs of one key in flight at once; more are answered 429."""
    cors_origins: tuple[str, ...] = ()
    """Web sites whose pages may ask, such as https://chat.example.org, or * for all."""
    metrics_compat: bool = False
    """Whether /metrics also has the names that vLLM's dashboards ask for."""
    tool_format: ToolFormat | None = None
    """How the model writes function calls; None: as its chat template says."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError(f"served model names are {self.model_names!r}; give at least one, none empty")
        for name in (
            "max_body_bytes",
            "body_timeout_s",
            "max_prompts",
            "max_prompt_logprobs",
            "max_live_requests",
            "max_live_prompt_tokens",
            "keep_alive_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be above 0")
        for name in ("queue_timeout_s", "request_timeout_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be above 0, or left out")
        if self.max_requests_per_key is not None and self.max_requests_per_key < 1:
            raise ConfigError(f"max requests per key is {self.max_requests_per_key}; it must be at least 1")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]+", origin):
                raise ConfigError(
                    f"CORS origin {origin!r} is none; write scheme and host, such as https://chat.example.org, or *"
                )
