"""Launching a step never waits for the device: whatever the step holds, and whatever its requests ask for."""

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from capture_tape import storages_of
from checkpoints import checkpoint, random_prompts
from device_watch import DeviceWatch, HostWaitError
from leanserve.bundled import bundled_model_dir
from leanserve.contracts.batch import Batch, StepResult
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.grammars.grammar import make_grammar_tokenizer
from leanserve.model.architecture import read_architecture
from leanserve.server.tokenizer import Tokenizer
from leanserve.worker.runner import Runner
from leanserve.worker.transfers import Download, upload
from mirror_ranks import mirrored_rank

PAGE = 16
META = torch.device("meta")
GREEDY = SamplingParams(temperature=0, max_tokens=8)
EVERYTHING: list[SamplingParams] = [
    GREEDY,
    SamplingParams(seed=1, max_tokens=8, logprobs=3, prompt_logprobs=2),
    SamplingParams(top_p=0.9, top_k=40, min_p=0.01, seed=2, max_tokens=8),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, min_tokens=3, max_tokens=8),
    SamplingParams(logit_bias={3: 1.0}, allowed_token_ids=(3, 4, 5), max_tokens=8),
    SamplingParams(structured_outputs=StructuredOutputsParams(regex="(.|\n)*"), ignore_eos=True, max_tokens=8),
]


class WatchedRunner:
    """An executor whose launches are watched."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._watch = DeviceWatch(storages_of(runner.launch))
        self.seen: set[str] = set()
        """What steps held."""

    def launch(self, batch: Batch) -> None:
        decode_rows = [row for row in batch.rows if row.count == 1 and row.samples]
        self.seen |= {"decode"} if decode_rows else set()
        self.seen |= {"prefill"} if len(batch.rows) > len(decode_rows) else set()
        self.seen |= {"both"} if 0 < len(decode_rows) < len(batch.rows) else set()
        self.seen |= {"copies"} if any(copy.rank == 0 for copy in batch.copies) else set()
        with self._watch:
            self._runner.launch(batch)

    def collect(self) -> StepResult:
        return self._runner.collect()


@pytest.fixture
def device_without_numbers(monkeypatch) -> torch.device:
    """It always answers 5."""
    pytest.importorskip("lean_attention.stream_k")  # before the variable: its kernels are not to be interpreted here
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the Triton backend be chosen without a GPU

    def wait(download: Download) -> torch.Tensor:
        return torch.full(download._host.shape, 5, dtype=download._host.dtype)

    monkeypatch.setattr(Download, "wait", wait)
    return META


@pytest.mark.parametrize(("num_ranks", "split"), [(1, "replicated"), (3, "replicated"), (3, "all")])
def test_launching_a_step_waits_for_nothing(tmp_path_factory, device_without_numbers, num_ranks, split):
    device = device_without_numbers
    architecture = read_architecture(checkpoint(tmp_path_factory, "mistral", layers=2, window=20, tied=True))
    tokenizer = Tokenizer.from_dir(bundled_model_dir())
    assert tokenizer is not None
    decoder, shard = mirrored_rank(
        architecture, num_ranks, num_pages=60, page_tokens=PAGE, device=device, dtype=torch.bfloat16, split=split
    )
    runner = Runner(
        decoder,
        shard,
        decoder.ranks,
        max_sequences=8,
        max_context_tokens=128,
        grammar_tokenizer=make_grammar_tokenizer(tokenizer.backend.to_str(), tokenizer.vocab_size, (3,)),
        backend="triton",
    )
    watched = WatchedRunner(runner)
    scheduler = Scheduler(KvSharding(PAGE, (60,) * num_ranks), BatchOptions(max_batch_tokens=40, max_sequences=8), 128)
    engine = Engine(scheduler, watched, (3,), overlap=True)
    prompts = random_prompts([4 * PAGE, 70, 1, 45, 23, 37], seed=4)
    requests = list(zip(prompts, EVERYTHING, strict=True))
    requests += [(prompts[0][: pages * PAGE], GREEDY) for pages in (4, 3, 2)]  # they share the first one's pages
    finished: dict[str, str] = {}
    for index, (prompt, sampling) in enumerate(requests):
        engine.submit(Submit(str(index), array("i", prompt).tobytes(), sampling))
        for _ in range(4):
            finished |= {output.request_id: str(output.finish_reason) for output in engine.step()}
    while engine.has_work:
        finished |= {output.request_id: str(output.finish_reason) for output in engine.step()}
    assert watched.seen == {"decode", "prefill", "both", "copies"}
    assert finished == {str(index): "length" for index in range(len(requests))}


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=META)),
        lambda x: x[[0, 2]],
        lambda x: x.__setitem__([0, 2], 1.0),
        lambda x: x[torch.zeros(2, dtype=torch.int64)],
        lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=META),
        lambda x: x + x.new_tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x + torch.from_numpy(np.ones(4, np.float32)).to(META),
    ],
)
def test_the_watch_refuses_what_waits(work: Callable[[torch.Tensor], Any]):
    x = torch.zeros(4, device=META)
    with pytest.raises((HostWaitError, NotImplementedError)) as raised, DeviceWatch(storages_of(lambda: x)):
        work(x)
    if raised.type is NotImplementedError:
        assert "no data" in str(raised.value), "a device without numbers was asked for one"


def test_the_watch_lets_pass_what_does_not_wait():
    x = torch.zeros(4, device=META)
    with DeviceWatch(storages_of(lambda: x)):
        rows = upload(np.array([0, 2]), META)
        x.index_fill_(0, rows, 1.0)
        x[rows] = x[rows] * 2.0 + torch.ones(2, device=META)
        x[1:3].masked_fill_(x[1:3] > 0, 0.5)
