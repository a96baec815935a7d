"""Where a step's time goes, as rank 0 tells it."""

from types import SimpleNamespace

import pytest
import torch

from checkpoints import checkpoint, random_prompts
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.stopwatch import Stopwatch
from rank_group import Case, run_cases


def test_a_stopwatch_counts_its_stretches_and_nothing_between(monkeypatch) -> None:
    now_s = iter((1.0, 3.0, 10.0, 14.0))
    monkeypatch.setattr("leanserve.distributed.stopwatch.time", SimpleNamespace(perf_counter=lambda: next(now_s)))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            pass
    assert watch.take_s() == 2.0 + 4.0
    assert watch.take_s() == 0


@pytest.mark.gpu
def test_a_stopwatch_on_a_gpu_does_not_wait_for_it() -> None:
    watch = Stopwatch(torch.device("cuda"))
    cycles = 2**31
    torch.cuda.synchronize()
    with watch:
        torch.cuda._sleep(cycles)
    assert watch.take_s() == 0, "the device is still at work"
    torch.cuda.synchronize()
    assert watch.take_s() > 0.1


def test_a_step_tells_what_each_part_of_it_took(tmp_path_factory) -> None:
    prompts, sampling = random_prompts([20], seed=1), SamplingParams(temperature=0, max_tokens=3)
    case = Case(checkpoint(tmp_path_factory, "llama"), prompts, sampling, max_batch_tokens=16)
    reports = run_cases(1, [case])[0].step_reports
    assert [(r.decode_rows, r.prefill_tokens) for r in reports] == [(0, 16), (0, 4), (1, 0), (1, 0), (0, 0)]
    assert [r.times.forward_s > 0 for r in reports] == [True] * 4 + [False], "the last one only says what to forget"
    assert [r.times.sample_s > 0 for r in reports[1:]] == [True] * 3 + [False]
    assert all(r.times.combine_s == 0 for r in reports), "one rank has nobody to wait for"
