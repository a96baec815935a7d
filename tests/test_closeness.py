"""The comparison that every numerical test rests on can fail."""

import pytest
import torch

from closeness import TOLERANCE, assert_close

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1.0, NAN], [1.0, NAN]),
        ([1.0, 2.0], [1.0, NAN]),
        ([1.0, INF], [1.0, 2.0]),
        ([1.0, INF], [1.0, -INF]),
        ([1.0, 1.1], [1.0, 1.0]),
        ([1.0], [1.0, 1.0]),
        ([0.006, 0.006], [0.0, 0.0]),  # under the maximum, above the RMS
    ],
)
def test_what_differs_fails(actual, expected):
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(actual), torch.tensor(expected), 0.01)


def test_what_agrees_passes():
    assert_close(torch.tensor([1.0, -INF, 2.0]), torch.tensor([1.003, -INF, 2.0]), 0.01)
    assert_close(torch.empty(0, 3), torch.empty(0, 3), torch.float32)
    assert TOLERANCE[torch.float32] < TOLERANCE[torch.float16] < TOLERANCE[torch.bfloat16]
