"""One rank's process, from its environment to its last step. Rank 0 also runs the engine.

torchrun runs `python -m leanserve.launch.rank`; under a user's own torchrun, `leanserve serve` comes here too.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import zmq

from leanserve.attention.kv_shard import KvShard
from leanserve.contracts.batch import Batch, StepResult, Stop
from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import ConfigError, EngineError, LeanServeError
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import (
    Configure,
    EngineFailed,
    EngineInfo,
    EngineReady,
    FromEngine,
    Hello,
    Loading,
    decode_to_engine,
    encode,
)
from leanserve.distributed.channel import StepReceiver, StepSender
from leanserve.distributed.ranks import Ranks
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.engine.service import serve
from leanserve.launch.lifeline import when_gone
from leanserve.launch.ranks_process import RUN_DIR_VARIABLE, engine_address
from leanserve.launch.threads import default_threads, user_set_threads
from leanserve.model.architecture import Architecture, read_architecture
from leanserve.model.decoder import Decoder
from leanserve.model.weights import load_weights
from leanserve.worker.device import choose_device, choose_dtype, describe
from leanserve.worker.memory import kv_budget_bytes, num_pages
from leanserve.worker.runner import Runner

__all__ = ["main", "run_rank"]

CONFIGURE_TIMEOUT_S = 1800.0
"""A front end may first download a model."""


@dataclass(frozen=True)
class Place:
    """This process among the ranks, as torchrun tells it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    agent_pid: int

    @classmethod
    def from_environment(cls) -> "Place":
        return cls(
            rank=int(os.environ["RANK"]),
            size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            agent_pid=os.getppid(),
        )


class Orders(msgspec.Struct, frozen=True):
    """What rank 0 passes on to the others through torchrun's store."""

    config: EngineConfig
    run_dir: str
    front_end_pid: int


def _die() -> None:
    os._exit(1)


def run_rank(start_front_end: Callable[[], Path] | None = None) -> int:
    """Serve as one rank until told to stop. Returns the process's exit code.

    Args:
        start_front_end: called on rank 0 where no front end started this group; returns the run directory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle
    place = Place.from_environment()
    when_gone(place.agent_pid, _die)
    if not user_set_threads(place.agent_pid):
        torch.set_num_threads(default_threads(place.local_size))
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=CONFIGURE_TIMEOUT_S),
    )
    with zmq.Context() as context:
        if place.rank == 0:
            run_dir = Path(os.environ[RUN_DIR_VARIABLE]) if start_front_end is None else start_front_end()
            return _run_rank_0(place, store, context, run_dir)
        orders = msgspec.json.decode(store.get("leanserve/orders"), type=Orders)
        when_gone(orders.front_end_pid, _die)
        return _run_other_rank(place, store, context, orders)


def _run_rank_0(place: Place, store: dist.Store, context: zmq.Context, run_dir: Path) -> int:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(engine_address(run_dir))

    def tell(message: FromEngine) -> None:
        socket.send(encode(message))

    try:
        configure = _wait_for_configuration(socket)
        when_gone(configure.front_end_pid, _die)
        orders = Orders(configure.config, str(run_dir), configure.front_end_pid)
        store.set("leanserve/orders", msgspec.json.encode(orders))
        loaded = _load(place, store, configure.config, lambda done, total: tell(Loading("weights", done, total)))
        sender = StepSender(context, run_dir, place.size)

        def execute(batch: Batch) -> StepResult:
            sender.send(batch)
            return loaded.runner.execute(batch)

        info = loaded.info
        scheduler = Scheduler(loaded.sharding, configure.config.batch, max_context_tokens=info.max_context_tokens)
        engine = Engine(scheduler, execute, eos_token_ids=info.eos_token_ids)
        tell(EngineReady(info))
        serve(engine, socket)
        sender.send(Stop())
        loaded.ranks.leave()
        sender.close()
        return 0
    except LeanServeError as error:
        tell(EngineFailed(str(error)))
        return 1
    except Exception as error:
        tell(EngineFailed(f"rank 0 failed: {type(error).__name__}: {error}"))
        raise
    finally:
        socket.close()


def _run_other_rank(place: Place, store: dist.Store, context: zmq.Context, orders: Orders) -> int:
    try:
        loaded = _load(place, store, orders.config, lambda done, total: None)
        receiver = StepReceiver(context, Path(orders.run_dir), place.rank)
        while isinstance(message := receiver.receive(), Batch):
            loaded.runner.execute(message)
        loaded.ranks.leave()
        receiver.close()
    except LeanServeError as error:
        print(f"leanserve: rank {place.rank}: {error}", file=sys.stderr)
        return 1
    return 0


def _wait_for_configuration(socket: "zmq.Socket[bytes]") -> Configure:
    socket.send(encode(Hello(os.getpid())))
    if not socket.poll(int(CONFIGURE_TIMEOUT_S * 1000)):
        raise EngineError(f"no front end answered in {CONFIGURE_TIMEOUT_S:.0f} s")
    message = decode_to_engine(socket.recv())
    if not isinstance(message, Configure):
        raise EngineError(f"the front end sent {type(message).__name__} before any configuration")
    return message


@dataclass(frozen=True)
class Loaded:
    """A rank that is ready to execute."""

    ranks: Ranks
    runner: Runner
    sharding: KvSharding
    info: EngineInfo


def _load(place: Place, store: dist.Store, config: EngineConfig, progress: Callable[[int, int], None]) -> Loaded:
    device = choose_device(config.device, place.local_rank, place.local_size, shares_gpu=config.comm == "gloo")
    backend = config.comm if config.comm != "auto" else ("gloo" if device.type == "cpu" else "nccl")
    ranks = Ranks.join(rank=place.rank, size=place.size, store=store, backend=backend, device=device)

    model_dir = Path(config.model_dir)
    architecture = read_architecture(model_dir)
    dtype = choose_dtype(config.dtype, architecture.dtype, device)
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
        activation_bytes=_activation_bytes(architecture, config, dtype),
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
    return Loaded(
        ranks=ranks,
        runner=Runner(decoder, shard, ranks, backend=attention),
        sharding=sharding,
        info=EngineInfo(
            architecture=architecture.description,
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
        ),
    )


def _activation_bytes(architecture: Architecture, config: EngineConfig, dtype: torch.dtype) -> int:
    """Of one full step: the widest layer's activations, its float32 attention states from all ranks, and logits."""
    tokens = config.batch.max_batch_tokens
    widest = 2 * architecture.intermediate_size + 4 * architecture.hidden_size
    states = architecture.num_heads * (architecture.head_dim + 1) * 4 * 3
    logits = config.batch.max_sequences * architecture.vocab_size * 4 * 2
    return tokens * (widest * dtype.itemsize * 2 + states) + logits


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


def main() -> None:
    sys.exit(run_rank())


if __name__ == "__main__":
    main()
