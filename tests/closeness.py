"""One way to compare tensors, one table of tolerances."""

import torch
from torch import Tensor

TOLERANCE = {
    torch.float32: 2e-5,
    # A value of size 4 rounds by 2e-3 in float16 (11 bits) and 1.6e-2 in bfloat16 (8 bits).
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
"""The largest absolute difference allowed, by the dtype of what was computed from."""

LSE_TOLERANCE = {
    torch.float32: TOLERANCE[torch.float32],
    # Scores and sums are float32, but torch's fused CPU kernel takes a quicker exponential where keys are bfloat16: a
    # weight is off by a few 1e-5. Scores rounded to bfloat16 would miss by 3e-2 at a logit of 10.
    torch.bfloat16: 2e-4,
}
"""The same for the lse of the portable path, where scores stay float32 whatever the keys are."""


def assert_close(actual: Tensor, expected: Tensor, tolerance: torch.dtype | float) -> None:
    """Fail unless every element is within `tolerance` and the RMS error within a third of it.

    The tolerance is a number, or a dtype of the table. Infinities must agree in place and sign; a NaN on either side
    fails.
    """
    limit = TOLERANCE[tolerance] if isinstance(tolerance, torch.dtype) else tolerance
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    for name, tensor in (("actual", actual), ("expected", expected)):
        assert not tensor.isnan().any(), f"{name} holds {int(tensor.isnan().sum())} NaN of {tensor.numel()}"
    same_infinity = actual == expected
    error = torch.where(same_infinity, 0.0, (actual - expected).abs())
    if error.numel() == 0:
        return
    worst, rms = float(error.max()), float(error.square().mean().sqrt())
    seen = (
        f"max error {worst:.3g} (limit {limit:.3g}), RMS error {rms:.3g} (limit {limit / 3:.3g}) "
        f"over {error.numel()} elements of shape {tuple(actual.shape)}"
    )
    assert worst <= limit, seen
    assert rms <= limit / 3, seen
