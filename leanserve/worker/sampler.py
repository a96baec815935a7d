"""Logits -> next tokens. One uniform number per token, a function of (seed, index) alone.

So a seeded request draws the same numbers alone or in a crowd, on any rank count, before and after a preemption.
"""

from dataclasses import dataclass

import numpy as np
import torch

from leanserve.contracts.sampling import SamplingParams
from leanserve.worker.transfers import upload

__all__ = ["Draw", "sample", "uniform"]

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Draw:
    """What one row needs to be sampled."""

    sampling: SamplingParams
    seed: int
    index: int
    """How many tokens the request generated before this one."""


def _splitmix64(state: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood 2014) for this 64-bit state."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, index: int) -> float:
    """The index-th number in [0, 1) of the stream that `seed` names; 53 random bits."""
    return (_splitmix64(_splitmix64(seed & _MASK) ^ index) >> 11) * 2.0**-53


def sample(logits_MV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Next token of each row: int64 [M].

    Temperature 0 takes the largest logit, ties to the lowest id. Otherwise, in this order: divide by temperature,
    keep the top_k most likely, of those the smallest set that reaches top_p, of those the ones with at least min_p
    times the largest probability; then invert the cumulative distribution at the row's uniform number.

    Args:
        logits_MV: float32.
    """
    tokens_M = torch.argmax(logits_MV, dim=-1)
    random = [m for m, draw in enumerate(draws) if not draw.sampling.is_greedy]
    for draw_rows, rows in (
        (_draw_from_all, [m for m in random if not _truncates(draws[m].sampling)]),
        (_draw_from_likely, [m for m in random if _truncates(draws[m].sampling)]),
    ):
        if rows:
            rows_M = upload(np.array(rows), logits_MV.device)
            tokens_M[rows_M] = draw_rows(logits_MV[rows_M], _Wishes.of([draws[m] for m in rows], logits_MV))
    return tokens_M


@dataclass(frozen=True)
class _Wishes:
    """What rows ask for, and their uniform numbers, as columns on the device: float64 [M, 1]."""

    temperature_M1: torch.Tensor
    top_k_M1: torch.Tensor
    top_p_M1: torch.Tensor
    min_p_M1: torch.Tensor
    number_M1: torch.Tensor

    @classmethod
    def of(cls, draws: list[Draw], logits_MV: torch.Tensor) -> "_Wishes":
        vocab_size, params = logits_MV.shape[1], [draw.sampling for draw in draws]
        columns = [
            [p.temperature for p in params],
            [p.top_k or vocab_size for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [uniform(draw.seed, draw.index) for draw in draws],
        ]
        return cls(*upload(np.array(columns, np.float64), logits_MV.device).unsqueeze(2))


def _truncates(sampling: SamplingParams) -> bool:
    return sampling.top_k is not None or sampling.top_p < 1 or sampling.min_p > 0


def _draw_from_all(logits_MV: torch.Tensor, wishes: _Wishes) -> torch.Tensor:
    return _invert(_probabilities(logits_MV, wishes), wishes)


def _draw_from_likely(logits_MV: torch.Tensor, wishes: _Wishes) -> torch.Tensor:
    probs_MV, ids_MV = torch.sort(_probabilities(logits_MV, wishes), dim=-1, descending=True, stable=True)
    probs_MV = probs_MV.masked_fill(torch.arange(probs_MV.shape[1], device=probs_MV.device) >= wishes.top_k_M1, 0.0)
    probs_MV = probs_MV / probs_MV.sum(dim=-1, keepdim=True)
    # A token stays while the mass before it is below top_p, so the most likely one always stays.
    before_MV = probs_MV.cumsum(dim=-1) - probs_MV
    probs_MV = probs_MV.masked_fill(before_MV >= wishes.top_p_M1, 0.0)
    probs_MV = probs_MV.masked_fill(probs_MV < wishes.min_p_M1 * probs_MV[:, :1], 0.0)
    # Drawn in the order of ids, not of likelihood: two tokens that are equally likely but for rounding would change
    # places, and with them what is drawn, from one company of rows to another.
    return _invert(torch.zeros_like(probs_MV).scatter_(1, ids_MV, probs_MV), wishes)


def _probabilities(logits_MV: torch.Tensor, wishes: _Wishes) -> torch.Tensor:
    return torch.softmax(logits_MV.double() / wishes.temperature_M1, dim=-1)


def _invert(probs_MV: torch.Tensor, wishes: _Wishes) -> torch.Tensor:
    """The first place of each row whose cumulative mass exceeds the row's number; never one without mass."""
    cumulative_MV = probs_MV.cumsum(dim=-1)
    total_M1 = cumulative_MV[:, -1:].contiguous()
    below_total_M1 = torch.nextafter(total_M1, torch.zeros_like(total_M1))  # a product may round up to the total
    sought_M1 = torch.minimum(wishes.number_M1 * total_M1, below_total_M1)
    return torch.searchsorted(cumulative_MV, sought_M1, right=True).squeeze(1)
