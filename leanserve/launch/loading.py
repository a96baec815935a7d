"""From a checkpoint and options to a rank that can execute steps."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from llguidance import LLTokenizer

from lean_attention import Backend
from lean_attention.backend import choose_backend
from leanserve.attention.kv_shard import KvShard
from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import ConfigError
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import EngineInfo
from leanserve.distributed.ranks import Ranks
from leanserve.grammars.grammar import make_grammar_tokenizer
from leanserve.launch.host_facts import gib
from leanserve.launch.place import Place
from leanserve.model.activations import activation_bytes
from leanserve.model.architecture import Architecture, read_architecture
from leanserve.model.decoder import Decoder
from leanserve.model.partition import Partition
from leanserve.model.split_choice import CPU_COSTS, GPU_COSTS, SplitChoice, choose_split, describe_split
from leanserve.model.weights import load_weights
from leanserve.server.tokenizer import Tokenizer
from leanserve.worker.device import choose_comm, choose_device, choose_dtype, describe
from leanserve.worker.graphs import CudaCapture, supports_graphs
from leanserve.worker.memory import allocating, kv_budget_bytes, memory_per_rank, num_pages
from leanserve.worker.runner import Runner
from leanserve.worker.warm_up import warm_up

__all__ = ["LoadedRank", "load_rank"]

logger = logging.getLogger("leanserve.launch")


@dataclass(frozen=True)
class LoadedRank:
    """A rank that is ready to execute."""

    ranks: Ranks
    decoder: Decoder
    shard: KvShard
    runner: Runner
    sharding: KvSharding
    info: EngineInfo

    def leave(self) -> None:
        """Leave the group: the last thing that a rank does.

        Its graphs go first. NCCL does not end a communicator as long as a graph holds one of its kernels, but waits.
        """
        self.runner.close()
        self.ranks.leave()


def load_rank(
    place: Place,
    store: dist.Store,
    config: EngineConfig,
    progress: Callable[[int, int], None],
    capture_progress: Callable[[int, int], None] = lambda done, total: None,
    warm_up_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedRank:
    """Join the group, load the weights, lay out the pool; on a GPU, compile the kernels and capture graphs. Every rank
    calls it with the same config.

    Args:
        progress: told (done, total) bytes of weights.
        capture_progress: told (done, total) CUDA graphs, where there are any.
        warm_up_progress: told (done, total) steps of `warm_up`, on a GPU.

    Raises:
        ConfigError: an option this machine or model cannot meet, or no memory for weights or KV cache.
        ModelError: the checkpoint cannot be served.
    """
    device = choose_device(config.device, place.local_rank, place.local_size, shares_gpu=config.comm == "gloo")
    comm = choose_comm(config.comm, device)
    ranks = Ranks.join(rank=place.rank, size=place.size, store=store, backend=comm, device=device)

    model_dir = Path(config.model_dir)
    architecture = read_architecture(model_dir)
    dtype = choose_dtype(config.dtype, architecture.checkpoint_dtype, device)
    ranks_on_device = place.local_size if config.comm == "gloo" and device.type == "cuda" else 1
    choice = _split(
        config, architecture, dtype.itemsize, ranks, ranks_on_host=place.local_size, ranks_on_device=ranks_on_device
    )
    attention = _choose_attention(config, device)
    dtype_name = str(dtype).removeprefix("torch.")
    weights_bytes = Partition(architecture, choice.split, ranks.rank, ranks.size).num_parameters * dtype.itemsize
    with allocating(
        f"this rank's weights, {gib(weights_bytes)} as {dtype_name}",
        instead="use more ranks, with --weights all, or a smaller --dtype",
    ):
        decoder = Decoder(
            architecture,
            ranks=ranks,
            split=choice.split,
            dtype=dtype,
            device=device,
            backend=attention if config.fused_kernels else "portable",
        )
        load_weights(decoder, model_dir, progress=progress)

    captures = supports_graphs(ranks, attention) and not config.enforce_eager
    kv_bytes_per_token = architecture.kv_bytes_per_token(dtype.itemsize)
    page_bytes = kv_bytes_per_token * config.cache.page_tokens
    ranks.gather_ints(0)  # all have loaded: what is free now is nobody's weights-to-be
    budget = kv_budget_bytes(
        config.cache.kv_memory_bytes,
        device,
        ranks_on_host=place.local_size,
        ranks_on_device=ranks_on_device,
        activation_bytes=activation_bytes(
            architecture,
            config.batch,
            dtype.itemsize,
            page_tokens=config.cache.page_tokens,
            captures_graphs=captures,
        ),
    )
    # A pool of the size that was asked for is each rank's own; what is free is shared on one host, or one GPU.
    shares_memory = config.cache.kv_memory_bytes is None and (device.type == "cpu" or ranks_on_device > 1)
    pages_per_rank = ranks.gather_ints(num_pages(budget, page_bytes, config.cache.page_tokens))
    sharding = KvSharding(page_tokens=config.cache.page_tokens, pages_per_rank=pages_per_rank)
    num_own_pages = pages_per_rank[place.rank]
    with allocating(
        f"this rank's KV cache, {gib(num_own_pages * page_bytes)} beside weights of {gib(weights_bytes)}, and a step",
        instead="lower --kv-memory, which is per rank",
    ):
        shard = KvShard(
            num_layers=architecture.num_layers,
            num_pages=num_own_pages,
            num_kv_heads=architecture.num_kv_heads,
            page_tokens=config.cache.page_tokens,
            head_dim=architecture.head_dim,
            dtype=dtype,
            device=device,
        )
        max_context_tokens = _max_context_tokens(config, architecture, sharding)
        if device.type == "cuda":
            _warm_up(decoder, shard, ranks, sharding, config, max_context_tokens, attention, warm_up_progress)
        runner = Runner(
            decoder,
            shard,
            ranks,
            max_sequences=config.batch.max_sequences,
            max_context_tokens=max_context_tokens,
            grammar_tokenizer=_grammar_tokenizer(model_dir, architecture) if place.rank == 0 else None,
            backend=attention,
        )
        if captures:
            runner.capture_graphs(CudaCapture(device), capture_progress)
    return LoadedRank(
        ranks=ranks,
        decoder=decoder,
        shard=shard,
        runner=runner,
        sharding=sharding,
        info=EngineInfo(
            architecture=architecture.describe(),
            vocab_size=architecture.vocab_size,
            eos_token_ids=architecture.eos_token_ids,
            max_context_tokens=max_context_tokens,
            model_max_tokens=architecture.max_context_tokens,
            page_tokens=config.cache.page_tokens,
            pages_per_rank=pages_per_rank,
            kv_bytes_per_token=kv_bytes_per_token,
            dtype=dtype_name,
            device=describe(device),
            attention=attention,
            captures_graphs=captures,
            prefix_cache=config.cache.prefix_cache and not decoder.rope.depends_on_length,
            weights=describe_split(decoder.partition, dtype.itemsize, choice.reason),
            tokens_of_one_more_rank=0 if shares_memory else min(pages_per_rank) * config.cache.page_tokens,
        ),
    )


def _warm_up(
    decoder: Decoder,
    shard: KvShard,
    ranks: Ranks,
    sharding: KvSharding,
    config: EngineConfig,
    max_context_tokens: int,
    attention: Backend,
    progress: Callable[[int, int], None],
) -> None:
    began_s = time.monotonic()
    warm_up(
        decoder,
        shard,
        ranks,
        sharding,
        max_batch_tokens=config.batch.max_batch_tokens,
        max_context_tokens=max_context_tokens,
        backend=attention,
        progress=progress,
    )
    if ranks.rank == 0:
        took_s = time.monotonic() - began_s
        logger.info("kernels compiled and tried in %.1f s", took_s, extra={"event": "warmed_up", "seconds": took_s})


def _choose_attention(config: EngineConfig, device: torch.device) -> Backend:
    try:
        return choose_backend(None if config.attention == "auto" else config.attention, device)
    except ValueError as error:
        raise ConfigError(f"--attention {config.attention}: {error}") from error


def _split(
    config: EngineConfig,
    architecture: Architecture,
    dtype_bytes: int,
    ranks: Ranks,
    *,
    ranks_on_host: int,
    ranks_on_device: int,
) -> SplitChoice:
    """Which weights are split; the same on every rank, also where their memories differ."""
    if config.weights != "auto":
        return SplitChoice(config.weights, reason="")
    memory = memory_per_rank(ranks.device, ranks_on_host=ranks_on_host, ranks_on_device=ranks_on_device)
    on_cpu = ranks.device.type == "cpu"
    return choose_split(
        architecture,
        ranks=ranks.size,
        ranks_per_memory=ranks_on_host if on_cpu else ranks_on_device,
        dtype_bytes=dtype_bytes,
        costs=CPU_COSTS if on_cpu else GPU_COSTS,
        memory_bytes=min(ranks.gather_ints(memory)),
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
        return min(architecture.max_context_tokens, sharding.total_tokens)
    if wanted > architecture.max_context_tokens:
        raise ConfigError(
            f"max context tokens is {wanted}, but the model's own limit (max_position_embeddings, and what rope "
            f"scaling makes of it) is {architecture.max_context_tokens}"
        )
    if wanted > sharding.total_tokens:
        raise ConfigError(
            f"max context tokens is {wanted}, but the KV cache of all ranks holds {sharding.total_tokens} tokens; "
            "raise --kv-memory or --ranks"
        )
    return wanted
