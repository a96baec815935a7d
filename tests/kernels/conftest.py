"""Both backends through the same tests: portable always; Triton on a GPU, or on the CPU under TRITON_INTERPRET=1."""

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
def outputs_are_written(uninitialised_memory_is_nan: None) -> None:
    """In every test."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
