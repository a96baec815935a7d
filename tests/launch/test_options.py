"""What is left open in the options of a launch, and what is made of it."""

from pathlib import Path

import pytest

from leanserve.contracts.config import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from leanserve.launch.options import LaunchOptions


@pytest.mark.parametrize(
    ("gpus", "given", "batch_tokens"),
    [(0, None, CPU_BATCH_TOKENS), (2, None, GPU_BATCH_TOKENS), (0, 77, 77), (2, 77, 77)],
    ids=["cpu", "gpus", "cpu-given", "gpus-given"],
)
def test_a_step_holds_what_suits_the_device(monkeypatch, gpus: int, given: int | None, batch_tokens: int) -> None:
    monkeypatch.setattr("leanserve.launch.options.count_gpus", lambda device: (gpus, None))
    config = LaunchOptions(max_batch_tokens=given).engine_config(Path("/nowhere"))
    assert config.batch.max_batch_tokens == batch_tokens


def test_without_gpus_no_gpu_is_looked_for() -> None:
    assert LaunchOptions(device="cpu", ranks=3).count_ranks() == (3, None)
    assert LaunchOptions(device="cpu").engine_config(Path("/nowhere")).batch.max_batch_tokens == CPU_BATCH_TOKENS
