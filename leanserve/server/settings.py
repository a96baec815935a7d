"""What the front end was told: names, limits, times."""

from dataclasses import dataclass

from leanserve.contracts.errors import ConfigError

__all__ = ["ServerSettings"]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP face."""

    model_names: tuple[str, ...]
    """Names the model answers to; the first is the one in answers. Compared, never used as paths."""
    max_body_bytes: int = 16 << 20
    """Longest request body. A million token ids take about 7 MB."""
    body_timeout_s: float = 60.0
    """A request whose body has not arrived by then is answered 408."""
    max_prompts: int = 128
    """Prompts in one request."""
    max_live_requests: int = 4096
    """Prompts at the engine at once, running or waiting; more are answered 503."""
    keep_alive_s: float = 15.0
    """A stream that is silent for so long gets a comment (proxies cut silent connections, often at 60 s)."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError(f"served model names are {self.model_names!r}; give at least one, none empty")
        for name in (
            "max_body_bytes",
            "body_timeout_s",
            "max_prompts",
            "max_live_requests",
            "keep_alive_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be above 0")
