"""A rank's own past beside rank 0's, with a step in flight and without."""

import os

import pytest
import torch.distributed as dist

from checkpoints import checkpoint
from leanserve.contracts.batch import Batch, step_checksum
from leanserve.contracts.config import CacheOptions, EngineConfig
from leanserve.contracts.errors import DesyncError
from leanserve.launch.loading import load_rank
from leanserve.launch.place import Place
from leanserve.worker.runner import Runner


@pytest.fixture
def runner(tmp_path_factory) -> Runner:
    model_dir = checkpoint(tmp_path_factory, "llama")
    config = EngineConfig(model_dir=str(model_dir), device="cpu", cache=CacheOptions(kv_memory_bytes=1 << 20))
    place = Place(rank=0, size=1, local_rank=0, local_size=1, agent_pid=os.getpid())
    return load_rank(place, dist.HashStore(), config, lambda done, total: None).runner


def step(number: int, checked_step: int, wrong: int = 0) -> Batch:
    checksum = step_checksum(checked_step, []) if checked_step else 0
    return Batch(number, [], [], [], [], [], checked_step, checksum ^ wrong)


def test_a_message_may_name_either_of_the_two_newest_steps(runner):
    runner.launch(step(1, 0))
    runner.launch(step(2, 0))
    assert [runner.collect().step, runner.collect().step] == [1, 2]
    runner.launch(step(3, 1))
    assert runner.collect().step == 3
    runner.launch(step(4, 3))
    assert runner.steps_in_flight == [4]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (step(3, 1, wrong=1), "rank 0 has checksum 0x[0-9a-f]{8} for step 1, .* drifted apart"),
        (step(3, 2), "rank 0 has completed step 1, rank 0 step 2 already"),
        (step(4, 1), "rank 0 got step 4 after step 2; a step was lost"),
    ],
    ids=["another-checksum", "not-collected", "a-step-too-many"],
)
def test_ranks_that_drift_apart_stop_with_an_error(runner, message, says):
    runner.launch(step(1, 0))
    runner.launch(step(2, 0))
    runner.collect()
    with pytest.raises(DesyncError, match=says):
        runner.launch(message)
