"""How long steps get: never beside streams, and alone as far as the machine keeps up."""

import pytest

from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import ConfigError
from leanserve.engine.step_budget import PREFILL_STEP_S, StepBudget

HALF_S = PREFILL_STEP_S / 2
OPTIONS = BatchOptions(max_batch_tokens=500, max_prefill_step_tokens=1800)


def budget_after(*steps: tuple[int, float], options: BatchOptions = OPTIONS) -> int:
    """What a step without decode rows may hold when steps of (tokens, seconds) have been computed."""
    budget = StepBudget(options)
    for tokens, took_s in steps:
        budget.note(tokens, took_s)
    assert budget.tokens(num_decode_rows=1) == options.max_batch_tokens
    return budget.tokens(num_decode_rows=0)


@pytest.mark.parametrize(
    ("steps", "tokens"),
    [
        ([], 500),
        ([(500, HALF_S)], 1000),
        ([(500, HALF_S), (1000, 0.0)], 1800),
        ([(500, HALF_S), (1000, 0.0), (1800, HALF_S)], 1800),
        ([(500, HALF_S * 1.01)], 500),
        ([(500, PREFILL_STEP_S * 2)], 500),
        ([(499, 0.0)], 500),
        ([(500, 0.0), (500, 0.0)], 1000),
        ([(500, 0.0), (1000, PREFILL_STEP_S)], 1000),
        ([(500, 0.0), (1000, PREFILL_STEP_S * 1.01)], 500),
        ([(500, 0.0), (1000, 0.0), (7, PREFILL_STEP_S * 9)], 900),
        ([(500, 0.0), (1000, 0.0), (1800, 2.0), (900, 2.0)], 500),
    ],
    ids=[
        "at-first",
        "in-half-the-time",
        "up-to-the-limit",
        "at-the-limit",
        "in-more-than-half",
        "never-below",
        "not-full",
        "launched-before-the-last-was-known",
        "just-in-time",
        "too-long",
        "too-long-though-not-full",
        "too-long-twice",
    ],
)
def test_a_step_of_prompts_alone_is_as_long_as_was_computed_in_time(
    steps: list[tuple[int, float]], tokens: int
) -> None:
    assert budget_after(*steps) == tokens


def test_one_limit_is_the_limit_of_every_step() -> None:
    assert budget_after((77, 0.0), (77, 0.0), options=BatchOptions(max_batch_tokens=77)) == 77


def test_a_longest_step_below_the_others_is_refused() -> None:
    with pytest.raises(ConfigError, match="max prefill step tokens is 99; it must be at least max batch tokens, 100"):
        BatchOptions(max_batch_tokens=100, max_prefill_step_tokens=99)
