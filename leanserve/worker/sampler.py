"""Logits -> next tokens. The noise of each candidate is a function of (seed, index, token id) alone.

So a seeded request draws the same numbers alone or in a crowd, on any rank count, before and after a preemption. What
its company does change is the rounding of its logits, and that changes the token only where two candidates finish
within that rounding of each other: to invert a cumulative distribution would add up the rounding of all candidates, and
the borders between all of them could be crossed.
"""

from dataclasses import dataclass

import numpy as np
import torch

from leanserve.contracts.sampling import SamplingParams
from leanserve.worker.transfers import upload

__all__ = ["Draw", "gumbel_noise", "sample"]

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class Draw:
    """What one row needs to be sampled."""

    sampling: SamplingParams
    seed: int
    index: int
    """How many tokens the request generated before this one."""

    @property
    def key(self) -> int:
        """Names the row's noise: int64."""
        return _signed(_splitmix64(_splitmix64(self.seed & _MASK) ^ self.index))


def _splitmix64(state: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood 2014) for this 64-bit state."""
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def _signed(bits: int) -> int:
    """The int64 of these 64 bits."""
    return bits - ((bits >> 63) << 64)


def gumbel_noise(key_M1: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel numbers, one for each row and token id: float64 [M, V].

    Row m's are from the outputs of splitmix64 with the state `key_M1[m]`, 52 bits of each as a number inside (0, 1).

    Args:
        key_M1: int64.
    """
    z_MV = key_M1 + torch.arange(1, vocab_size + 1, device=key_M1.device) * _signed(_GOLDEN)
    scratch_MV = torch.empty_like(z_MV)

    def high_bits(count: int) -> torch.Tensor:
        """z >> (64 - count), as if int64 had no sign."""
        return torch.bitwise_right_shift(z_MV, 64 - count, out=scratch_MV).bitwise_and_((1 << count) - 1)

    z_MV.bitwise_xor_(high_bits(34)).mul_(_signed(_MIX_1))
    z_MV.bitwise_xor_(high_bits(37)).mul_(_signed(_MIX_2))
    z_MV.bitwise_xor_(high_bits(33))
    uniform_MV = high_bits(52).double().add_(0.5).mul_(2.0**-52)
    return uniform_MV.log_().neg_().log_().neg_()


def sample(logits_MV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Next token of each row: int64 [M].

    Temperature 0 takes the largest logit, ties to the lowest id. Otherwise, in this order: divide by temperature,
    keep the top_k most likely, of those the smallest set that reaches top_p, of those the ones with at least min_p
    times the largest probability; then take the largest sum of logit and Gumbel noise, which draws from the softmax
    of what is kept (the Gumbel-max trick: Gumbel 1954; Maddison, Tarlow, Minka 2014).

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
            tokens_M[rows_M] = draw_rows(logits_MV[rows_M], [draws[m] for m in rows])
    return tokens_M


def _truncates(sampling: SamplingParams) -> bool:
    return sampling.top_k is not None or sampling.top_p < 1 or sampling.min_p > 0


def _draw_from_all(logits_MV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    return _with_noise(_tempered(logits_MV, draws), draws).argmax(dim=-1)


def _draw_from_likely(logits_MV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    vocab_size, params = logits_MV.shape[1], [draw.sampling for draw in draws]
    limits = [[p.top_k or vocab_size for p in params], [p.top_p for p in params], [p.min_p for p in params]]
    top_k_M1, top_p_M1, min_p_M1 = upload(np.array(limits, np.float64), logits_MV.device).unsqueeze(2)
    logits_MV = _tempered(logits_MV, draws)
    probs_MV, ids_MV = torch.sort(torch.softmax(logits_MV, dim=-1), dim=-1, descending=True, stable=True)
    probs_MV = probs_MV.masked_fill(torch.arange(vocab_size, device=probs_MV.device) >= top_k_M1, 0.0)
    probs_MV = probs_MV / probs_MV.sum(dim=-1, keepdim=True)
    # A token stays while the mass before it is below top_p, so the most likely one always stays.
    before_MV = probs_MV.cumsum(dim=-1) - probs_MV
    kept_MV = (before_MV < top_p_M1) & (probs_MV >= min_p_M1 * probs_MV[:, :1]) & (probs_MV > 0)
    noisy_MV = _with_noise(logits_MV, draws).gather(1, ids_MV).masked_fill(~kept_MV, -torch.inf)
    return ids_MV.gather(1, noisy_MV.argmax(dim=-1, keepdim=True)).squeeze(1)


def _tempered(logits_MV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Divided by temperature, the largest of each row at 0, so that no temperature is too low: float64."""
    temperature_M = upload(np.array([draw.sampling.temperature for draw in draws], np.float64), logits_MV.device)
    logits_MV = logits_MV.double()
    return logits_MV.sub_(logits_MV.amax(dim=-1, keepdim=True)).div_(temperature_M[:, None])


def _with_noise(logits_MV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    key_M = upload(np.array([draw.key for draw in draws], np.int64), logits_MV.device)
    return gumbel_noise(key_M[:, None], logits_MV.shape[1]).add_(logits_MV)
