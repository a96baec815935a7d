"""From a checkpoint and options to a rank that can execute steps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch._dynamo  # noqa: F401 -- custom operators import it in their first call, and a step would pay seconds for it
import torch.distributed as dist
from llguidance import LLTokenizer

from leanserve.attention.kv_shard import KvShard
from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import ConfigError
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import EngineInfo
from leanserve.distributed.ranks import Ranks
from leanserve.grammars.grammar import make_grammar_tokenizer
from leanserve.launch.place import Place
from leanserve.model.activations import activation_bytes
from leanserve.model.architecture import Architecture, read_architecture
from leanserve.model.decoder import Decoder
from leanserve.model.weights import load_weights
from leanserve.server.tokenizer import Tokenizer
from leanserve.worker.device import choose_device, choose_dtype, describe
from leanserve.worker.memory import kv_budget_bytes, num_pages
from leanserve.worker.runner import Runner

__all__ = ["LoadedRank", "load_rank"]


@dataclass(frozen=True)
class LoadedRank:
    """A rank that is ready to execute."""

    ranks: Ranks
    decoder: Decoder
    shard: KvShard
    runner: Runner
    sharding: KvSharding
    info: EngineInfo


def load_rank(
    place: Place, store: dist.Store, config: EngineConfig, progress: Callable[[int, int], None]
) -> LoadedRank:
    """Join the group, load the weights and lay out the pool. Every rank calls it with the same config.

    Args:
        progress: told (done, total) bytes of weights.

    Raises:
        ConfigError: an option this machine or model cannot meet.
        ModelError: the checkpoint cannot be served.
    """
    device = choose_device(config.device, place.local_rank, place.local_size, shares_gpu=config.comm == "gloo")
    backend = config.comm if config.comm != "auto" else ("gloo" if device.type == "cpu" else "nccl")
    ranks = Ranks.join(rank=place.rank, size=place.size, store=store, backend=backend, device=device)

    model_dir = Path(config.model_dir)
    architecture = read_architecture(model_dir)
    dtype = choose_dtype(config.dtype, architecture.checkpoint_dtype, device)
    decoder = Decoder(architecture, dtype=dtype, device=device)
    load_weights(decoder, model_dir, progress=progress)

    kv_bytes_per_token = architecture.kv_bytes_per_token(dtype.itemsize)
    page_bytes = kv_bytes_per_token * config.cache.page_tokens
    ranks_on_device = place.local_size if config.comm == "gloo" and device.type == "cuda" else 1
    budget = kv_budget_bytes(
        config.cache.kv_memory_bytes,
        device,
        ranks_on_host=place.local_size,
        ranks_on_device=ranks_on_device,
        activation_bytes=activation_bytes(architecture, config.batch, dtype.itemsize),
    )
    pages_per_rank = ranks.gather_ints(num_pages(budget, page_bytes, config.cache.page_tokens))
    sharding = KvSharding(page_tokens=config.cache.page_tokens, pages_per_rank=pages_per_rank)
    shard = KvShard(
        num_layers=architecture.num_layers,
        num_pages=pages_per_rank[place.rank],
        num_kv_heads=architecture.num_kv_heads,
        page_tokens=config.cache.page_tokens,
        head_dim=architecture.head_dim,
        dtype=dtype,
        device=device,
    )
    attention = config.attention if config.attention != "auto" else None
    return LoadedRank(
        ranks=ranks,
        decoder=decoder,
        shard=shard,
        runner=Runner(
            decoder,
            shard,
            ranks,
            grammar_tokenizer=_grammar_tokenizer(model_dir, architecture) if place.rank == 0 else None,
            backend=attention,
        ),
        sharding=sharding,
        info=EngineInfo(
            architecture=architecture.describe(),
            vocab_size=architecture.vocab_size,
            eos_token_ids=architecture.eos_token_ids,
            max_context_tokens=_max_context_tokens(config, architecture, sharding),
            model_max_tokens=architecture.max_positions,
            page_tokens=config.cache.page_tokens,
            pages_per_rank=pages_per_rank,
            kv_bytes_per_token=kv_bytes_per_token,
            dtype=str(dtype).removeprefix("torch."),
            device=describe(device),
            attention=attention or ("portable" if device.type == "cpu" else "triton"),
            prefix_cache=config.cache.prefix_cache and not decoder.rope.depends_on_length,
        ),
    )


def _grammar_tokenizer(model_dir: Path, architecture: Architecture) -> LLTokenizer | None:
    """What structured outputs need on the rank that samples."""
    tokenizer = Tokenizer.from_dir(model_dir)
    if tokenizer is None:
        return None
    vocab_size = max(architecture.vocab_size, tokenizer.vocab_size)
    return make_grammar_tokenizer(tokenizer.backend.to_str(), vocab_size, architecture.eos_token_ids)


def _max_context_tokens(config: EngineConfig, architecture: Architecture, sharding: KvSharding) -> int:
    wanted = config.cache.max_context_tokens
    if wanted is None:
        return min(architecture.max_positions, sharding.total_tokens)
    if wanted > architecture.max_positions:
        raise ConfigError(
            f"max context tokens is {wanted}, but the model's own limit (max_position_embeddings) is "
            f"{architecture.max_positions}"
        )
    if wanted > sharding.total_tokens:
        raise ConfigError(
            f"max context tokens is {wanted}, but the KV cache of all ranks holds {sharding.total_tokens} tokens; "
            "raise --kv-memory or --ranks"
        )
    return wanted
