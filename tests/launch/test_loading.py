"""What a rank refuses when it has read the checkpoint and counted its memory."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoints import checkpoint
from leanserve.contracts.config import CacheOptions, EngineConfig
from leanserve.contracts.errors import ConfigError
from leanserve.launch.loading import load_rank
from leanserve.launch.place import Place
from leanserve.worker.memory import allocating


@pytest.mark.parametrize(
    ("max_context_tokens", "kv_memory_bytes", "said"),
    [
        (9999, 8 << 20, r"9999, but the model's own limit \(max_position_embeddings, .*\) is 4096"),
        (4000, 64 << 10, r"4000, but the KV cache of all ranks holds \d+ tokens; raise --kv-memory or --ranks"),
        (None, 1 << 10, "holds no page"),
    ],
)
def test_a_context_or_cache_that_cannot_be_is_refused(tmp_path_factory, max_context_tokens, kv_memory_bytes, said):
    cache = CacheOptions(page_tokens=16, max_context_tokens=max_context_tokens, kv_memory_bytes=kv_memory_bytes)
    with pytest.raises(ConfigError, match=said):
        load(checkpoint(tmp_path_factory, "llama"), cache)


def test_a_kv_cache_that_cannot_be_allocated_is_named_with_its_option(tmp_path_factory) -> None:
    """More than any address space holds, so that every machine refuses."""
    cache = CacheOptions(page_tokens=256, kv_memory_bytes=1 << 49)
    said = r"no memory for this rank's KV cache, 393216\.0 GiB beside weights of 0 MiB, and a step; lower --kv-memory"
    with pytest.raises(ConfigError, match=said):
        load(checkpoint(tmp_path_factory, "llama"), cache)


def test_weights_that_cannot_be_allocated_are_named(tmp_path_factory, tmp_path) -> None:
    config = json.loads((checkpoint(tmp_path_factory, "llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 1 << 24, "hidden_size": 1 << 24}))
    with pytest.raises(ConfigError, match=r"no memory for this rank's weights, [0-9.]+ GiB as float32; use more ranks"):
        load(tmp_path, CacheOptions(page_tokens=16))


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (MemoryError(), ConfigError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), ConfigError),
        (RuntimeError("CUDA error: out of memory"), ConfigError),
        (RuntimeError("shapes do not match"), RuntimeError),
        (ConfigError("too long"), ConfigError),
    ],
)
def test_only_want_of_memory_is_final(error, becomes) -> None:
    with pytest.raises(becomes) as raised, allocating("it", instead="do without"):
        raise error
    assert ("no memory for it; do without" in str(raised.value)) == (raised.value is not error)


def load(model_dir: Path, cache: CacheOptions) -> None:
    config = EngineConfig(model_dir=str(model_dir), device="cpu", cache=cache)
    place = Place(rank=0, size=1, local_rank=0, local_size=1, agent_pid=0)
    load_rank(place, dist.HashStore(), config, lambda done, total: None)
