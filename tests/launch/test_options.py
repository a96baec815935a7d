"""What is left open in the options of a launch, and what is made of it."""

from pathlib import Path

import pytest

from leanserve.contracts.config import CPU_BATCH, GPU_BATCH, BatchOptions
from leanserve.launch.options import LaunchOptions


@pytest.mark.parametrize(
    ("gpus", "given", "batch"),
    [
        (0, None, CPU_BATCH),
        (2, None, GPU_BATCH),
        (0, 77, BatchOptions(max_batch_tokens=77)),
        (2, 77, BatchOptions(max_batch_tokens=77)),
    ],
    ids=["cpu", "gpus", "cpu-given", "gpus-given"],
)
def test_a_step_holds_what_suits_the_device(monkeypatch, gpus: int, given: int | None, batch: BatchOptions) -> None:
    monkeypatch.setattr("leanserve.launch.options.count_gpus", lambda device: (gpus, None))
    config = LaunchOptions(max_batch_tokens=given).engine_config(Path("/nowhere"))
    assert config.batch == batch


def test_without_gpus_no_gpu_is_looked_for() -> None:
    assert LaunchOptions(device="cpu", ranks=3).count_ranks() == (3, None)
    assert LaunchOptions(device="cpu").engine_config(Path("/nowhere")).batch == CPU_BATCH
