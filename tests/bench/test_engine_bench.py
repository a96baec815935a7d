"""`bench engine` end to end on a tiny model, and that both sides do the same work."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zmq
from typer.testing import CliRunner

from leanserve.bench.commands import bench_app
from leanserve.bench.leanserve_ranks import engine_on_filled_cache
from leanserve.bench.noise import random_prompts
from leanserve.bench.random_model import TINY, make_checkpoint
from leanserve.bench.system import System
from leanserve.bench.task import MIN_STEPS, Cell, StepClock, Task, repeated
from leanserve.bench.transformers_peer import generate, load, run_transformers
from leanserve.contracts.config import BatchOptions, CacheOptions, EngineConfig
from leanserve.contracts.errors import EngineError
from leanserve.contracts.messages import Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.channel import StepSender
from leanserve.engine.engine import Engine
from leanserve.launch.all_ranks import make_engine
from leanserve.launch.loading import LoadedRank, load_rank
from leanserve.launch.place import Place
from leanserve.worker.runner import Runner

BATCH, PROMPT_TOKENS, NEW_TOKENS = 3, 150, 8


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random-model")
    make_checkpoint(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return random_prompts(BATCH, PROMPT_TOKENS, TINY.vocab_size, seed=7)


@pytest.fixture(scope="module")
def peers_tokens(model_dir, prompts) -> list[list[int]]:
    return generate(load(model_dir, "float32"), prompts, NEW_TOKENS).tolist()


def answer(engine: Engine, prompts: torch.Tensor) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.submit(
            Submit(str(index), prompt.numpy().tobytes(), SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
        )
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
    return tokens


def load_one_rank(model_dir: Path) -> tuple[LoadedRank, EngineConfig]:
    config = EngineConfig(
        model_dir=str(model_dir),
        dtype="float32",
        device="cpu",
        cache=CacheOptions(kv_memory_bytes=1 << 22),
        batch=BatchOptions(max_batch_tokens=BATCH * PROMPT_TOKENS),
    )
    place = Place(rank=0, size=1, local_rank=0, local_size=1, agent_pid=os.getpid())
    return load_rank(place, dist.HashStore(), config, lambda done, total: None), config


def with_fresh_runner(loaded: LoadedRank) -> LoadedRank:
    """The same pool under a runner that remembers nothing."""
    runner = Runner(
        loaded.decoder,
        loaded.shard,
        loaded.ranks,
        max_sequences=BATCH,
        max_context_tokens=loaded.info.max_context_tokens,
    )
    return dataclasses.replace(loaded, runner=runner)


def test_both_sides_do_the_same_work(model_dir, prompts, peers_tokens, tmp_path):
    """Equal greedy tokens: after a real prefill, and on a cache that holds what a real prefill left."""
    loaded, config = load_one_rank(model_dir)
    with zmq.Context() as context:
        sender = StepSender(context, tmp_path, num_ranks=1)
        assert answer(make_engine(loaded, config, sender), prompts) == peers_tokens
        # The allocator gives a fresh engine the very pages that the prompts were just prefilled into.
        fresh = with_fresh_runner(loaded)
        assert answer(engine_on_filled_cache(fresh, config, sender), prompts) == peers_tokens


def test_the_filled_cache_is_what_decode_reads(model_dir, prompts, peers_tokens, tmp_path):
    """The same with other numbers in the cache gives other tokens: the shortcut reads the whole context."""
    loaded, config = load_one_rank(model_dir)
    with zmq.Context() as context:
        sender = StepSender(context, tmp_path, num_ranks=1)
        answer(make_engine(loaded, config, sender), prompts)
        fresh = with_fresh_runner(loaded)
        loaded.shard.pool_L2PKTD[:, 1, 0, :, :1] += 100.0  # one value vector of the first prompt's first token
        changed = answer(engine_on_filled_cache(fresh, config, sender), prompts)
    assert changed[0] != peers_tokens[0]
    assert changed[1:] == peers_tokens[1:]


def test_the_command_writes_what_it_promises(tmp_path):
    arguments = ["engine", "--tiny", "--contexts", "64", "--batches", "1", "--dtypes", "float32", "--ranks", "1"]
    run = CliRunner().invoke(bench_app, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)
    assert run.exit_code == 0, run.stderr
    assert "Decode, tokens/s" in run.stdout
    assert "Time to first token" in run.stdout
    assert (tmp_path / "engine.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "engine.json").read_bytes())
    assert report["benchmark"] == "engine"
    assert set(report["machine"]) >= {"cpu", "cores", "memory_gib", "versions", "commit", "date", "load_average"}
    assert set(report["machine"]["versions"]) >= {"leanserve", "torch", "transformers"}
    assert report["settings"]["threads"] >= 1
    assert report["settings"]["read_bytes_per_s"] > 1e8
    assert report["model"]["num_hidden_layers"] == TINY.num_hidden_layers
    assert all(isinstance(caveat, str) for caveat in report["caveats"])
    assert report["ended_early"] is None
    assert report["targets"] == []  # the promise is about 16k tokens
    [cell] = report["cells"]
    assert cell["cell"] == {"dtype": "float32", "context_tokens": 64, "batch": 1}
    assert cell["not_measured"] == {}
    # Layers, final norm, output matrix and one embedding row; keys and values of 64 tokens.
    weights = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 320 * 64 + 64
    assert cell["decode_read_bytes"] == 4 * (weights + 64 * 2 * 2 * 2 * 16)
    ours, theirs = cell["systems"]["leanserve 1 rank"], cell["systems"]["transformers"]
    for figures in (ours, theirs):
        assert figures["decode_steps"] >= MIN_STEPS
        assert figures["decode_tokens_per_s"] == pytest.approx(1e3 / figures["decode_step_ms"], rel=0.01)
        assert figures["first_token_s"] > 0
        assert figures["first_token_runs"] >= 1
    speedup = theirs["decode_step_ms"] / ours["decode_step_ms"]
    assert cell["decode_speedup"] == {"leanserve 1 rank": pytest.approx(speedup, abs=0.001)}
    speedup = theirs["first_token_s"] / ours["first_token_s"]
    assert cell["first_token_speedup"] == {"leanserve 1 rank": pytest.approx(speedup, abs=0.001)}


def test_a_system_that_fails_is_named(tmp_path):
    """There is no model to load: the error says who failed, at what, and how."""
    task = Task(Cell("float32", 64, 1), "decode")
    failure = pytest.raises(EngineError, match=r"transformers ended while it measured decode .* exit codes 1 ")
    with System("transformers", 1, run_transformers, 1, tmp_path) as peer, failure:
        peer.measure(task)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--contexts", "1", "at least 2"), ("--batches", "0", "at least 1"), ("--dtypes", "int8", "bfloat16")],
)
def test_a_wrong_option_is_named(option, value, said):
    result = CliRunner().invoke(bench_app, ["engine", option, value])
    assert result.exit_code == 2
    assert option in result.output
    assert said in result.output


def test_a_clock_drops_the_first_step_and_sees_at_least_five(monkeypatch):
    now_s = iter([100.0, 102.0, 104.0, 107.0, 109.0, 111.0])
    monkeypatch.setattr("leanserve.bench.task.time.perf_counter", lambda: next(now_s))
    clock = StepClock()
    assert [clock.tick() for _ in range(6)] == [False] * 5 + [True]
    assert clock.timing().seconds == 2.0
    assert clock.timing().samples == 5


def test_long_runs_are_not_repeated():
    assert repeated(lambda: 5.0).samples == 1
    runs_s = iter([0.3, 0.1, 0.2])
    assert repeated(lambda: next(runs_s)).seconds == 0.2
