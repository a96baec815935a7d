"""How many tokens: fixed, uniform, log-normal, listed, or mixed by share.

    512                    always 512
    512-4096               uniform, both ends included
    lognormal:2k:0.8       the median, and the standard deviation of the logarithm; an optional third number caps it
    512,2k,16k             these, in turn
    95%:512,5%:128k        shares of any of the forms above

k is 1024 and M is 1024 x 1024.
"""

import math
import random
import re
from collections.abc import Callable

from leanserve.contracts.errors import ConfigError
from leanserve.contracts.token_counts import parse_tokens

__all__ = ["Lengths"]

_MIXED = re.compile(r"(\d+(?:\.\d+)?)%[:\s]\s*(.+)")
_Draw = Callable[[random.Random, int], int]
"""The length of the request with this index."""


class Lengths:
    """A distribution of token counts, read from its written form. `text` is that form."""

    def __init__(self, text: str, option: str = "--prompt-tokens") -> None:
        self.text = text.strip()
        self._option = option
        items = [item.strip() for item in self.text.split(",")]
        shares = [_MIXED.fullmatch(item) for item in items]
        if all(shares):
            self._draw = self._mixed([(float(share[1]), share[2]) for share in shares if share])
        elif any(shares):
            raise ConfigError(
                f"{option}: {text!r} mixes shares with lengths that have none; give every length its share"
            )
        else:
            forms = [self._one(item) for item in items]
            self._draw = lambda rng, index: forms[index % len(forms)](rng, index)

    def draw(self, rng: random.Random, index: int) -> int:
        """The length of request `index`, at least 1."""
        return self._draw(rng, index)

    def _mixed(self, parts: list[tuple[float, str]]) -> _Draw:
        total = sum(share for share, _ in parts)
        if abs(total - 100) > 0.01:
            raise ConfigError(f"{self._option}: the shares of {self.text!r} add up to {total:g}%; they must make 100%")
        weights = [share for share, _ in parts]
        forms = [self._one(item) for _, item in parts]
        return lambda rng, index: rng.choices(forms, weights)[0](rng, index)

    def _one(self, item: str) -> _Draw:
        if item.startswith("lognormal:"):
            return self._lognormal(item.split(":")[1:])
        low, dash, high = item.partition("-")
        first = parse_tokens(low, self._option)
        if not dash:
            return lambda rng, index: first
        last = parse_tokens(high, self._option)
        if last < first:
            raise ConfigError(f"{self._option}: {item!r} runs from {first:,} down to {last:,}; give the smaller first")
        return lambda rng, index: rng.randint(first, last)

    def _lognormal(self, numbers: list[str]) -> _Draw:
        if len(numbers) not in (2, 3):
            raise ConfigError(
                f"{self._option}: {self.text!r}; write lognormal:MEDIAN:SIGMA or lognormal:MEDIAN:SIGMA:MAX"
            )
        median = parse_tokens(numbers[0], self._option)
        try:
            sigma = float(numbers[1])
        except ValueError:
            sigma = math.nan
        if not 0 <= sigma <= 5:
            raise ConfigError(f"{self._option}: sigma is {numbers[1]!r}; it must be a number between 0 and 5")
        most = parse_tokens(numbers[2], self._option) if len(numbers) == 3 else 2**40
        return lambda rng, index: min(most, max(1, round(rng.lognormvariate(math.log(median), sigma))))
