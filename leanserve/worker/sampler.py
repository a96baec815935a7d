"""Logits -> next tokens. One uniform number per token, a function of (seed, index) alone.

So a seeded request draws the same numbers alone or in a crowd, on any rank count, before and after a preemption.
"""

from dataclasses import dataclass

import torch

from leanserve.contracts.sampling import SamplingParams

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
    rows = [m for m, draw in enumerate(draws) if not draw.sampling.is_greedy]
    if rows:
        picked = _sample_random(logits_MV[rows], [draws[m] for m in rows])
        tokens_M[torch.tensor(rows, device=tokens_M.device)] = picked
    return tokens_M


def _sample_random(logits_MV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    device, vocab_size = logits_MV.device, logits_MV.shape[1]

    def column(values: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

    params = [draw.sampling for draw in draws]
    probs_MV = torch.softmax(logits_MV.double() / column([p.temperature for p in params]), dim=-1)
    ids_MV = None
    if any(p.top_k is not None or p.top_p < 1 or p.min_p > 0 for p in params):
        probs_MV, ids_MV = torch.sort(probs_MV, dim=-1, descending=True, stable=True)
        top_k = column([min(p.top_k or vocab_size, vocab_size) for p in params], torch.int64)
        probs_MV = probs_MV.masked_fill(torch.arange(vocab_size, device=device) >= top_k, 0.0)
        probs_MV = probs_MV / probs_MV.sum(dim=-1, keepdim=True)
        # A token stays while the mass before it is below top_p, so the most likely one always stays.
        before_MV = probs_MV.cumsum(dim=-1) - probs_MV
        probs_MV = probs_MV.masked_fill(before_MV >= column([p.top_p for p in params]), 0.0)
        floor = column([p.min_p for p in params]) * probs_MV[:, :1]
        probs_MV = probs_MV.masked_fill(probs_MV < floor, 0.0)
    cumulative_MV = probs_MV.cumsum(dim=-1)
    targets = column([uniform(d.seed, d.index) for d in draws]) * cumulative_MV[:, -1:]
    # The first entry whose cumulative mass exceeds the target; entries of zero mass can never be it.
    places = torch.searchsorted(cumulative_MV, targets, right=True).clamp_(max=vocab_size - 1)
    return (places if ids_MV is None else ids_MV.gather(1, places)).squeeze(1)
