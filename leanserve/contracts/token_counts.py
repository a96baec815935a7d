"""Numbers of tokens as people write them, on every command line alike."""

import re
from fractions import Fraction

from leanserve.contracts.errors import ConfigError

__all__ = ["parse_tokens"]

_TOKENS = re.compile(r"(\d+(?:\.\d+)?)\s*([km]?)")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_tokens(text: str, option: str = "a number of tokens") -> int:
    """Read 131072, 128k (of 1,024), 1.5k or 1M (of 1,048,576).

    Args:
        option: what the number is for, in a message.

    Raises:
        ConfigError: it is no such number, or not positive.
    """
    match = _TOKENS.fullmatch(text.strip().lower())
    tokens = 0 if match is None else int(Fraction(match[1]) * _UNITS[match[2]])
    if tokens < 1:
        raise ConfigError(f"{option}: {text[:50]!r} is not a positive number of tokens such as 512, 16k or 1M")
    return tokens
