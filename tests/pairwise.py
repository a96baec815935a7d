"""Test cases that cover every pair of choices, and no more cases than that needs."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def pairwise_cases(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases (name -> value) in which any two values of any two factors meet at least once. The same ones every time.

    Greedy: each case is grown around one pair that is still missing, by the values that meet the most missing pairs.
    """
    names = list(factors)
    choices = {name: range(len(factors[name])) for name in names}
    missing = {
        ((a, i), (b, j)) for a, b in combinations(names, 2) for i, j in product(choices[a], choices[b])
    }  # fmt: skip
    cases = []
    while missing:
        chosen = dict(min(missing, key=lambda pair: [(names.index(name), i) for name, i in pair]))
        for name in names:
            if name in chosen:
                continue
            gains = [
                sum(_pair(names, (name, i), (other, j)) in missing for other, j in chosen.items())
                for i in choices[name]
            ]
            # Ties go to the least used so far, by turns.
            best = max(choices[name], key=lambda i: (gains[i], (i - len(cases)) % len(gains)))
            chosen[name] = best
        missing -= {_pair(names, x, y) for x, y in combinations(chosen.items(), 2)}
        cases.append({name: factors[name][chosen[name]] for name in names})
    return cases


def _pair(names: list[str], x: tuple[str, int], y: tuple[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    return (x, y) if names.index(x[0]) < names.index(y[0]) else (y, x)
