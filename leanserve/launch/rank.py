"""One rank's process, from its environment to its last step. Rank 0 also runs the engine.

torchrun runs `python -m leanserve.launch.rank`; under a user's own torchrun, `leanserve serve` comes here too.
"""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Event

import msgspec
import torch
import torch.distributed as dist
import zmq

from leanserve.contracts.batch import Batch, StepResult, Stop
from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import EngineError, LeanServeError
from leanserve.contracts.messages import (
    Configure,
    EngineFailed,
    EngineReady,
    FromEngine,
    Hello,
    Loading,
    decode_to_engine,
    encode,
)
from leanserve.distributed.channel import StepReceiver, StepSender
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.engine.service import serve
from leanserve.launch.lifeline import when_gone
from leanserve.launch.loading import LoadedRank, Place, load_rank
from leanserve.launch.ranks_process import RUN_DIR_VARIABLE, engine_address
from leanserve.launch.threads import default_threads, user_set_threads

__all__ = ["follow", "main", "make_engine", "run_rank"]

CONFIGURE_TIMEOUT_S = 1800.0
"""A front end may first download a model."""


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
        store.set("leanserve/orders", msgspec.json.encode(orders).decode())
        loaded = load_rank(
            place,
            store,
            configure.config,
            lambda done, total: tell(Loading("weights", done, total)),
            lambda done, total: tell(Loading("CUDA graphs", done, total)),
        )
    except LeanServeError as error:
        tell(EngineFailed(str(error)))
        socket.close()
        return 1
    except Exception as error:
        tell(EngineFailed(f"rank 0 could not load: {type(error).__name__}: {error}"))
        socket.close()
        raise
    sender = StepSender(context, run_dir, place.size)
    engine = make_engine(loaded, configure.config, sender)
    tell(EngineReady(loaded.info))
    try:
        serve(engine, socket, Event())
        sender.send(Stop())
        loaded.ranks.leave()
    finally:
        sender.close()
        socket.close()
    return 0


def make_engine(loaded: LoadedRank, config: EngineConfig, sender: StepSender) -> Engine:
    """The engine of rank 0: every step goes out to the other ranks before it is computed here."""

    def execute(batch: Batch) -> StepResult:
        sender.send(batch)
        return loaded.runner.execute(batch)

    info = loaded.info
    scheduler = Scheduler(loaded.sharding, config.batch, info.max_context_tokens, prefix_cache=info.prefix_cache)
    return Engine(scheduler, execute, info.eos_token_ids)


def _run_other_rank(place: Place, store: dist.Store, context: zmq.Context, orders: Orders) -> int:
    try:
        loaded = load_rank(place, store, orders.config, lambda done, total: None)
        follow(loaded, StepReceiver(context, Path(orders.run_dir), place.rank))
        loaded.ranks.leave()
    except LeanServeError as error:
        print(f"leanserve: rank {place.rank}: {error}", file=sys.stderr)
        return 1
    return 0


def follow(loaded: LoadedRank, receiver: StepReceiver) -> None:
    """Execute what rank 0 says until it says stop."""
    while isinstance(message := receiver.receive(), Batch):
        loaded.runner.execute(message)
    receiver.close()


def _wait_for_configuration(socket: "zmq.Socket[bytes]") -> Configure:
    socket.send(encode(Hello(os.getpid())))
    if not socket.poll(int(CONFIGURE_TIMEOUT_S * 1000)):
        raise EngineError(f"no front end answered in {CONFIGURE_TIMEOUT_S:.0f} s")
    message = decode_to_engine(socket.recv())
    if not isinstance(message, Configure):
        raise EngineError(f"the front end sent {type(message).__name__} before any configuration")
    return message


def main() -> None:
    sys.exit(run_rank())


if __name__ == "__main__":
    main()
