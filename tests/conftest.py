"""For all tests: one thread a process (the models are tiny), a path that child processes share, and the same examples
of every property each time."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is first imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch refuses matrix products where it must not vary
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# A busy machine is slow, and that is no failure; neither is an example that only this run happened to draw. To look for
# new ones: pytest --hypothesis-profile explore
_of_any_speed = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", derandomize=True, **_of_any_speed)
settings.register_profile("explore", **_of_any_speed)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage, and there are many, has to look through it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # at the end the interpreter looks through all of it once


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What a kernel allocates and forgets to write shows."""
    import torch

    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
