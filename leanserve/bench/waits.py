"""How long others wait beside a long prefill: a short request's first token, and streams that run, on one CPU rank with
the bundled model."""

import os
import statistics
import tempfile
import time
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import zmq

from leanserve.bench.noise import random_prompts
from leanserve.contracts.config import CPU_BATCH, BatchOptions, CacheOptions, EngineConfig
from leanserve.contracts.messages import Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.channel import StepSender
from leanserve.engine.engine import Engine
from leanserve.launch.all_ranks import make_engine
from leanserve.launch.loading import load_rank
from leanserve.launch.options import LaunchOptions
from leanserve.launch.place import Place
from leanserve.model.architecture import read_architecture

__all__ = ["Waits", "measure_waits"]

PAGE_TOKENS = 64
STREAMS, STREAM_PROMPT_TOKENS = 4, 16
SHORT_PROMPT_TOKENS = 100
STEPS_BETWEEN_SHORT = 6


class Waits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and in brackets of a chunk's time: the longer of the steps that somebody waited for."""

    long_prompt_tokens: int
    max_batch_tokens: int
    streams: int
    short_prompt_tokens: int
    chunk_s: float
    """The median step while the long prompt was computed."""
    longest_chunk_s: float
    """A chunk takes longer the more comes before it."""
    first_token_s: list[float]
    """Of each short request; it comes when a step has just begun."""
    first_token_chunks: float
    """The longest of them."""
    longest_gap_s: float
    """Between two tokens of a stream."""
    longest_gap_chunks: float
    """The largest of the gaps, each in units of the longest step."""
    long_first_token_s: float


def measure_waits(long_prompt_tokens: int) -> Waits:
    """Serve STREAMS streams, then a prompt of `long_prompt_tokens`, and beside it short requests in turn."""
    model_dir = LaunchOptions().find_model()
    tokens = long_prompt_tokens + STREAMS * 4096 + 4096
    page_bytes = read_architecture(model_dir).kv_bytes_per_token(torch.float32.itemsize) * PAGE_TOKENS
    config = EngineConfig(
        model_dir=str(model_dir),
        dtype="float32",
        device="cpu",
        cache=CacheOptions(page_tokens=PAGE_TOKENS, kv_memory_bytes=-(-tokens // PAGE_TOKENS) * page_bytes),
        batch=CPU_BATCH,
    )
    place = Place(rank=0, size=1, local_rank=0, local_size=1, agent_pid=os.getpid())
    loaded = load_rank(place, dist.HashStore(), config, lambda done, total: None)
    with tempfile.TemporaryDirectory(prefix="leanserve-bench-") as folder, zmq.Context() as context:
        sender = StepSender(context, Path(folder), 1)
        run = _Run(make_engine(loaded, config, sender), loaded.info.vocab_size)
        waits = run.waits(long_prompt_tokens, config.batch)
        sender.close()
    return waits


class _Run:
    """An engine whose steps and tokens are timed."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._steps: list[tuple[float, float]] = []
        """Begin and end of each, in seconds."""
        self._token_steps: dict[str, list[int]] = {}
        """By request: the steps that gave it a token."""

    def _submit(self, name: str, prompt_tokens: int, max_tokens: int) -> None:
        prompt = random_prompts(1, prompt_tokens, self._vocab_size, seed=len(self._token_steps))
        self._token_steps[name] = []
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self._engine.submit(Submit(name, prompt.numpy().tobytes(), sampling))

    def _step(self) -> None:
        began = time.perf_counter()
        outputs = self._engine.step()
        self._steps.append((began, time.perf_counter()))
        for output in outputs:
            if output.token_ids:
                self._token_steps[output.request_id].append(len(self._steps) - 1)

    def waits(self, long_prompt_tokens: int, options: BatchOptions) -> Waits:
        for number in range(STREAMS):
            self._submit(f"stream {number}", STREAM_PROMPT_TOKENS, 4000)
        self._step()
        self._step()
        self._submit("long", long_prompt_tokens, 1)
        first = len(self._steps)
        asked: dict[str, int] = {}
        while not self._token_steps["long"]:
            step = len(self._steps)
            self._step()
            if (step - first) % STEPS_BETWEEN_SHORT == 1:  # asked for while that step ran
                name = f"short {len(asked)}"
                asked[name] = step
                self._submit(name, SHORT_PROMPT_TOKENS, 2)
        last = self._token_steps["long"][0]
        answered = {name: steps[0] for name in asked if (steps := self._token_steps[name])}
        first_token_s = [self._steps[answered[name]][1] - self._steps[asked[name]][0] for name in answered]
        first_token_chunks = [
            wait_s / self._longest_s(asked[name], answered[name])
            for name, wait_s in zip(answered, first_token_s, strict=True)
        ]
        gaps = [
            (self._steps[later][1] - self._steps[sooner][1], self._longest_s(sooner + 1, later))
            for number in range(STREAMS)
            for sooner, later in zip(
                self._token_steps[f"stream {number}"], self._token_steps[f"stream {number}"][1:], strict=False
            )
        ]
        return Waits(
            long_prompt_tokens=long_prompt_tokens,
            max_batch_tokens=options.max_batch_tokens,
            streams=STREAMS,
            short_prompt_tokens=SHORT_PROMPT_TOKENS,
            chunk_s=round(statistics.median(end - began for began, end in self._steps[first : last + 1]), 4),
            longest_chunk_s=round(self._longest_s(first, last), 4),
            first_token_s=[round(seconds, 4) for seconds in first_token_s],
            first_token_chunks=round(max(first_token_chunks), 3),
            longest_gap_s=round(max(gap_s for gap_s, _ in gaps), 4),
            longest_gap_chunks=round(max(gap_s / chunk_s for gap_s, chunk_s in gaps), 3),
            long_first_token_s=round(self._steps[last][1] - self._steps[first][0], 3),
        )

    def _longest_s(self, first: int, last: int) -> float:
        """Of the steps [first, last]."""
        return max(end - began for began, end in self._steps[first : last + 1])
