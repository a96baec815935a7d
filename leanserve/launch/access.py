"""Who may use a server, as the command line says it."""

import re
from dataclasses import dataclass
from pathlib import Path

from leanserve.server.auth import key_digests, read_key_file

__all__ = ["AccessOptions"]


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Keys and origins, not looked at yet."""

    keys: tuple[str, ...] = ()
    """Each one key, or several with commas or white space between them, as in LEANSERVE_API_KEYS."""
    key_file: Path | None = None
    max_requests_per_key: int | None = None
    cors_origins: tuple[str, ...] = ()

    @property
    def has_keys(self) -> bool:
        return bool(self.keys) or self.key_file is not None

    def digests(self) -> tuple[bytes, ...]:
        """What the server compares with; it does not keep the keys.

        Raises:
            ConfigError: the file cannot be read, or a key cannot be used.
        """
        keys = [key for given in self.keys for key in re.split(r"[,\s]+", given.strip())]
        return key_digests([*keys, *(read_key_file(self.key_file) if self.key_file is not None else ())])
