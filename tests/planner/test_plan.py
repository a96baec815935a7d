"""`leanserve plan`: its bytes are exact, its times follow from them, and it says what it was not told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from checkpoints import checkpoint
from leanserve.__main__ import app
from leanserve.bundled import bundled_model_dir
from leanserve.contracts.config import CacheOptions, DType, EngineConfig
from leanserve.contracts.errors import ConfigError
from leanserve.launch.loading import load_rank
from leanserve.launch.place import Place
from leanserve.model.architecture import Architecture, read_architecture
from leanserve.model.partition import Partition
from leanserve.planner.gpus import GPUS, find_gpu
from leanserve.planner.plan import Question, make_plan
from leanserve.planner.roofline import Constants, decode_time, prefill_time

PUBLISHED = Path(__file__).parents[1] / "model" / "published"

# Parameters as published with each model, and bfloat16 KV bytes of a token: layers x KV heads x head dim x 2 x 2.
KNOWN = {
    "llama-3.1-8b": (8_030_261_248, 32 * 8 * 128 * 4),
    "llama-3.1-70b": (70_553_706_496, 80 * 8 * 128 * 4),
    "llama-3.2-1b": (1_235_814_400, 16 * 8 * 64 * 4),
    "mistral-7b-v0.1": (7_241_732_096, 32 * 8 * 128 * 4),
    "mistral-7b-v0.3": (7_248_023_552, 32 * 8 * 128 * 4),
    "qwen2.5-0.5b": (494_032_768, 24 * 2 * 64 * 4),
    "qwen2.5-7b-instruct-1m": (7_615_616_512, 28 * 4 * 128 * 4),
    "qwen3-0.6b": (596_049_920, 28 * 8 * 128 * 4),
    "qwen3-32b": (32_762_123_264, 64 * 8 * 128 * 4),
    "smollm3-3b": (3_075_098_624, 36 * 4 * 128 * 4),
}


def architecture_of(name: str, tmp_path: Path) -> Architecture:
    shutil.copy(PUBLISHED / f"{name}.json", tmp_path / "config.json")
    return read_architecture(tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Architecture:
    return architecture_of("llama-3.1-8b", tmp_path)


def test_every_published_configuration_is_known() -> None:
    assert {path.stem for path in PUBLISHED.glob("*.json")} == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_bytes_of_published_models_are_exact(name: str, tmp_path: Path) -> None:
    parameters, kv_bytes = KNOWN[name]
    architecture = architecture_of(name, tmp_path)
    plan = make_plan(
        architecture, Question(gpu=find_gpu("B200"), ranks=1, context_tokens=1024, sequences=1), Constants()
    )
    memory = plan.asked[0].memory
    assert (memory.weights, memory.kv_bytes_per_token) == (2 * parameters, kv_bytes)


@pytest.mark.parametrize(("model", "dtype"), [("bundled", "float32"), ("qwen2", "bfloat16")])
def test_memory_is_what_a_rank_reports_at_start(
    model: str, dtype: DType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of two ranks: test_llm."""
    model_dir = bundled_model_dir() if model == "bundled" else checkpoint(tmp_path_factory, model)
    architecture = read_architecture(model_dir)
    question = Question(
        gpu=find_gpu("L4"), ranks=1, context_tokens=64, sequences=1, dtype=dtype, kv_bytes_per_rank=3 << 20
    )
    planned = make_plan(architecture, question, Constants()).asked[0]
    config = EngineConfig(
        model_dir=str(model_dir), dtype=dtype, device="cpu", cache=CacheOptions(kv_memory_bytes=3 << 20)
    )
    place = Place(rank=0, size=1, local_rank=0, local_size=1, agent_pid=0)
    info = load_rank(place, dist.HashStore(), config, lambda done, total: None).info
    assert info.pages_per_rank == (planned.memory.pages,)
    assert info.kv_bytes_per_token == planned.memory.kv_bytes_per_token
    assert info.max_context_tokens == planned.longest_context_tokens


def test_a_step_reads_what_it_must(llama: Architecture) -> None:
    """8.03e9 parameters less the embedding, and 128k tokens of keys, at 4.8 TB/s: 15.0 GB and 17.2 GB."""
    perfect = Constants(bandwidth_share=1.0)
    one = Partition(llama, "replicated", 0, 1)
    step = decode_time(one, find_gpu("H200"), perfect, dtype_bytes=2, context_tokens=131_072, sequences=1)
    read = 2 * (8_030_261_248 - 128_256 * 4096)
    assert step.weights_ms == pytest.approx(read / 4.8e12 * 1e3)
    assert step.kv_ms == pytest.approx(131_072 * 131_072 / 4.8e12 * 1e3)
    assert step.collectives_ms == 0
    assert step.total_ms == pytest.approx(step.weights_ms + step.kv_ms + step.kernels_ms)


def test_ranks_divide_keys_always_and_weights_where_they_are_split(llama: Architecture) -> None:
    question = Question(gpu=find_gpu("H200"), ranks=8, context_tokens=131_072, sequences=4)
    plan = make_plan(llama, question, Constants())
    norms, vocabulary, mlp, attention = 65 * 4096, 2 * 128_256 * 4096, 32 * 3 * 14_336 * 4096, 32 * 10_240 * 4096
    assert [deployment.memory.weights for deployment in plan.asked] == [
        2 * (norms + vocabulary + mlp + attention),
        2 * (norms + (vocabulary + mlp) // 8 + attention),
        2 * (norms + (vocabulary + mlp + attention) // 8),
    ]
    one, eight = plan.by_ranks[0].decode, plan.asked[0].decode
    assert one.kv_ms == pytest.approx(8 * eight.kv_ms)
    assert eight.collectives_ms > 0


def test_more_ranks_than_tokens_in_the_vocabulary_hold_whole_weights(llama: Architecture) -> None:
    question = Question(gpu=find_gpu("H200"), ranks=8, context_tokens=1024, sequences=1)
    plan = make_plan(replace(llama, vocab_size=7), question, Constants())
    assert [deployment.split for deployment in plan.asked] == ["replicated"]


def test_the_wire_of_a_prefill_is_what_the_design_counted(llama: Architecture) -> None:
    """128k tokens of an 8B model on 8 GPUs: 91 GB cross a rank's link for queries and float32 states."""
    gpu = find_gpu("H200")
    constants = Constants(link_share=1.0)
    prefill = prefill_time(Partition(llama, "replicated", 0, 8), gpu, constants, dtype_bytes=2, prompt_tokens=131_072)
    assert prefill.wire_s * gpu.link == pytest.approx(91e9, rel=0.01)


def test_a_window_bounds_reads_and_work(tmp_path: Path) -> None:
    windowed = architecture_of("mistral-7b-v0.1", tmp_path)
    gpu, constants = find_gpu("H100"), Constants()
    one = Partition(windowed, "replicated", 0, 1)

    def step_kv_ms(context: int) -> float:
        return decode_time(one, gpu, constants, dtype_bytes=2, context_tokens=context, sequences=1).kv_ms

    assert step_kv_ms(4096) == step_kv_ms(32_768) == 2 * step_kv_ms(2048)

    def attention_s(tokens: int) -> float:
        return prefill_time(one, gpu, constants, dtype_bytes=2, prompt_tokens=tokens).attention_s

    assert attention_s(32_768) == pytest.approx(15 * attention_s(4096), rel=1e-3)  # without a window: 64


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    big = architecture_of("llama-3.1-70b", tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--gpu", "H200", "--ranks", "2", "--concurrency", "8"])
    assert result.exit_code == 0
    assert "Does not fit" in result.output
    one = make_plan(big, Question(gpu=find_gpu("H200"), ranks=1, context_tokens=1024, sequences=1), Constants()).asked[
        0
    ]
    assert (one.fits, one.sequences, one.longest_context_tokens) == (False, 0, 0)


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    result = CliRunner().invoke(
        app,
        ["plan", "--gpu", "b200", "--ranks", "3", "--context", "16k", "--plot", str(picture)],
        env={"COLUMNS": "80"},
    )
    assert result.exit_code == 0, result.output
    assert "…" not in result.output, "a figure is cut"
    assert "3 x B200" in result.output
    assert "16,384 tokens" in result.output
    assert "estimates" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_measured_constants_replace_the_assumed_ones(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"bandwidth_share": 0.9, "collective_us": 9}))
    constants = Constants.calibrated(file)
    assert (constants.bandwidth_share, constants.collective_us) == (0.9, 9)
    assert constants.flops_share == Constants().flops_share


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"speed": 1}', "'speed'"),
        ('{"link_share": 1.5}', "at most 1"),
        ('{"layer_us": true}', "True"),
    ],
)
def test_wrong_constants_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        Constants.calibrated(file)


def test_a_context_beyond_the_model_is_refused(llama: Architecture) -> None:
    question = Question(gpu=GPUS[0], ranks=1, context_tokens=131_073, sequences=1)
    with pytest.raises(ConfigError, match="131,073"):
        make_plan(llama, question, Constants())


def test_an_unknown_gpu_lists_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"'H300'.*H200"):
        find_gpu("H300")
