"""Random numbers to measure on: what a cache holds, and prompts."""

import torch

__all__ = ["fill_with_noise", "random_prompts"]

NOISE_NUMBERS = 1 << 22


def fill_with_noise(tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor with standard normal numbers: the same four million over and over."""
    flat = tensor.view(-1)
    noise = torch.randn(min(NOISE_NUMBERS, flat.numel()), generator=torch.Generator().manual_seed(0))
    noise = noise.to(tensor.device, tensor.dtype)
    for start in range(0, flat.numel(), len(noise)):
        part = flat[start : start + len(noise)]
        part.copy_(noise[: len(part)])


def random_prompts(batch: int, tokens: int, vocab_size: int, *, seed: int) -> torch.Tensor:
    """Token ids, int32 [batch, tokens]; others for another seed, so that nothing can be reused between runs."""
    return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
