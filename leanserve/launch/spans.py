"""Where a server's OpenTelemetry spans go, if anywhere."""

import logging
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from leanserve.contracts.errors import ConfigError
from leanserve.launch.own_address import is_loopback

if TYPE_CHECKING:
    from leanserve.server.tracing import Tracing

__all__ = ["open_tracing"]

logger = logging.getLogger("leanserve.launch")

_STANDARD_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRACES_PATH = "/v1/traces"
_EXTRA = "pip install 'leanserve[otel]'"


def open_tracing(endpoint: str | None) -> "Tracing | None":
    """Begin to send spans. Nothing of OpenTelemetry's SDK is imported where nobody asked for them.

    Args:
        endpoint: a collector's base URL, to which `/v1/traces` is added. None: as OpenTelemetry's own variables say.
            These may be meant for every program on a machine, so a server that lacks the extra does without spans then.

    Raises:
        ConfigError: the URL is none, or the extra is not installed.
    """
    if endpoint is None and not any(os.environ.get(name) for name in _STANDARD_VARIABLES):
        return None
    url = None if endpoint is None else _traces_url(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        from leanserve.server.tracing import Tracing
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("opentelemetry"):
            raise
        if url is not None:
            raise ConfigError(f"--otlp-endpoint needs OpenTelemetry, which is not installed: {_EXTRA}") from None
        logger.warning(
            "OpenTelemetry's endpoint is set in the environment and its SDK is not installed: no spans (%s)",
            _EXTRA,
            extra={"event": "tracing_unavailable"},
        )
        return None
    logger.info("spans go to %s", url or "OpenTelemetry's endpoint", extra={"event": "tracing", "url": url})
    return Tracing(OTLPSpanExporter(endpoint=url))


def _traces_url(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname if parts.port != 0 else None
    except ValueError:  # of a port or an IPv6 address that is none
        parts, host = urlsplit(""), None
    if host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise ConfigError(
            f"--otlp-endpoint is {endpoint[:200]!r}; write a collector's base URL, such as http://127.0.0.1:4318"
        )
    if parts.username is not None:
        raise ConfigError(
            "--otlp-endpoint holds a user's name; give credentials in OTEL_EXPORTER_OTLP_HEADERS, which no log repeats"
        )
    if parts.scheme == "http" and not is_loopback(host):
        logger.warning("spans go to %s unencrypted", host, extra={"event": "tracing_unencrypted"})
    base = endpoint.rstrip("/")
    return base if base.endswith(_TRACES_PATH) else base + _TRACES_PATH
