"""Every error a user can meet.

LeanServeError
├── ConfigError             an option, or a combination of options, that cannot work (also a ValueError)
├── ModelError              the model cannot be served
│   ├── UnsupportedModelError   a known format, but an architecture or a feature we do not have
│   └── CheckpointError         files missing, unreadable, misshapen, or in a format we never read
├── RequestError            one request is wrong; nobody else is disturbed (also a ValueError)
│   └── RequestTooLongError     prompt and max_tokens can never fit
├── OverloadedError         no room now, try again later
└── EngineError             the engine failed or is gone
    └── DesyncError             two ranks disagree about the past

Messages say what was seen, what is allowed and what to do. HTTP status codes are mapped in `server.errors` alone.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DesyncError",
    "EngineError",
    "LeanServeError",
    "ModelError",
    "OverloadedError",
    "RequestError",
    "RequestTooLongError",
    "UnsupportedModelError",
]


class LeanServeError(Exception):
    """Base of every error that LeanServe raises on purpose."""


class ConfigError(LeanServeError, ValueError):
    """An option, or a combination of options, that cannot work."""


class ModelError(LeanServeError):
    """The model cannot be served."""


class UnsupportedModelError(ModelError):
    """A readable checkpoint of an architecture, or with a feature, that is not supported."""


class CheckpointError(ModelError):
    """Checkpoint files are missing, unreadable, misshapen, or in a format that is never read."""


class RequestError(LeanServeError, ValueError):
    """One request is wrong. `param` names the offending field, `code` is a stable short word for programs."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class RequestTooLongError(RequestError):
    """The prompt, with the tokens asked for, can never fit."""

    def __init__(self, message: str, *, param: str | None = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class OverloadedError(LeanServeError):
    """No room for the request now; `retry_after_s` is a hint for the client."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(LeanServeError):
    """The engine failed or is gone."""


class DesyncError(EngineError):
    """A rank's record of a past step differs from rank 0's: its answers would be garbage, so the group stops."""
