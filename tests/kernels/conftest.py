"""Both backends through the same tests: portable always; Triton on a GPU, or on the CPU under TRITON_INTERPRET=1."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from lean_attention.backend import Backend, choose_backend


@dataclass(frozen=True)
class Target:
    backend: Backend
    device: str

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"


@pytest.fixture(params=["portable", "triton"])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "portable":
        return Target("portable", "cpu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Target(choose_backend("triton", torch.device(device)), device)
    except ValueError:
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 before pytest starts")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What an operator allocates and forgets to write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
