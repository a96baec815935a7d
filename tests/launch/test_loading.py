"""What a rank refuses when it has read the checkpoint and counted its memory."""

import pytest
import torch.distributed as dist

from checkpoints import checkpoint
from leanserve.contracts.config import CacheOptions, EngineConfig
from leanserve.contracts.errors import ConfigError
from leanserve.launch.loading import load_rank
from leanserve.launch.place import Place


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
    config = EngineConfig(model_dir=str(checkpoint(tmp_path_factory, "llama")), device="cpu", cache=cache)
    place = Place(rank=0, size=1, local_rank=0, local_size=1, agent_pid=0)
    with pytest.raises(ConfigError, match=said):
        load_rank(place, dist.HashStore(), config, lambda done, total: None)
