"""One rank's process, from its environment to its last step. Rank 0 also runs the engine.

torchrun runs `python -m leanserve.launch.rank`; under a user's own torchrun, `leanserve serve` comes here too. A rank
lives for one attempt: when any of them fails, torchrun ends them all and starts all again, and the front end, which
outlives them, configures the next rank 0.
"""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
import zmq

from leanserve.contracts.batch import IdleCheck, Stop
from leanserve.contracts.errors import ConfigError, EngineError, LeanServeError, ModelError
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
from leanserve.engine.service import serve
from leanserve.launch.all_ranks import follow, make_engine
from leanserve.launch.lifeline import when_gone
from leanserve.launch.loading import load_rank
from leanserve.launch.meeting import Orders, compare_cards, convene, exchange_cards, join, reach_agent
from leanserve.launch.place import Place
from leanserve.launch.run_dir import RUN_DIR_VARIABLE, engine_address
from leanserve.launch.step_watch import StepWatch, dump_stacks_when_asked
from leanserve.launch.termination import Termination
from leanserve.launch.threads import default_threads, user_set_threads
from leanserve.server.logs import open_log_of_rank

__all__ = ["main", "run_rank"]

logger = logging.getLogger("leanserve.launch")

CONFIGURE_TIMEOUT_S = 1800.0
"""A front end may first download a model."""
_AFTER_OTHERS_S = 0.3
"""So much later ends a rank that met an error, most often a collective that another one broke. torchrun looks at its
ranks ten times a second, tells of one that failed and ends the others at once: let it be the one that was killed."""


@dataclass(frozen=True)
class _Member:
    """What a rank process has before it knows its orders."""

    place: Place
    host: str
    """This machine's address, as the others reach it."""
    agent_store: dist.Store
    context: "zmq.Context[zmq.Socket[bytes]]"
    termination: Termination | None
    """Under a user's own torchrun."""
    is_told: Event = field(default_factory=Event)
    """The front end, on this machine, has been told of what ends the server, and says it."""


def _die() -> None:
    os._exit(1)


def run_rank(attach_front_end: Callable[[dist.Store], Path] | None = None) -> int:
    """Serve as one rank until told to stop. Returns the process's exit code.

    Args:
        attach_front_end: called with the agent's store on rank 0 where no front end started this group: finds the one
            of an earlier attempt or starts one, and returns the run directory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle, or a `Termination`'s
    dump_stacks_when_asked()
    place = Place.from_environment()
    open_log_of_rank(rank=place.rank, pid=os.getpid())
    when_gone(place.agent_pid, _die)
    if not user_set_threads(place.agent_pid):
        torch.set_num_threads(default_threads(place.local_size))
    agent_store, host = reach_agent(place, CONFIGURE_TIMEOUT_S)
    with zmq.Context() as context:
        termination = None if attach_front_end is None else Termination()
        member = _Member(place, host, agent_store, context, termination)
        failed = True
        try:
            if place.rank == 0:
                _run_rank_0(member, _run_dir() if attach_front_end is None else attach_front_end(agent_store))
            else:
                _run_other_rank(member)
            failed = False
        except LeanServeError as error:
            level = logging.DEBUG if member.is_told.is_set() else logging.ERROR
            logger.log(level, "rank %d ends: %s", place.rank, error, extra={"event": "rank_failed"})
        except Exception as error:  # most often a collective that broke: the rank that broke it says more
            stack = "".join(traceback.format_tb(error.__traceback__, limit=-4))
            what = f"{type(error).__name__}: {error}"
            logger.error("rank %d ends: %s", place.rank, what, extra={"event": "rank_failed", "stack": stack})
            if place.size > 1:
                time.sleep(_AFTER_OTHERS_S)
    if failed and dist.is_initialized():
        # A broken group is left as it is: NCCL, asked to end it, may wait for a graph or for a rank that hangs.
        logging.shutdown()
        os._exit(1)
    return int(failed)


def _run_dir() -> Path:
    return Path(os.environ[RUN_DIR_VARIABLE])


def _run_rank_0(member: _Member, run_dir: Path) -> None:
    socket = member.context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(engine_address(run_dir))

    def tell(message: FromEngine) -> None:
        socket.send(encode(message))

    try:
        configure = _wait_for_configuration(socket)
        orders = Orders(
            config=configure.config,
            host=member.place.host,
            run_dir=str(run_dir),
            front_end_pid=configure.front_end_pid,
            pulse_address=configure.pulse_address,
        )
        store = convene(member.agent_store, member.host, orders, CONFIGURE_TIMEOUT_S)
        with _watched(member, store, orders) as watch:
            _serve_engine(member, store, orders, watch, socket, tell)
    except LeanServeError as error:
        tell(EngineFailed(str(error), is_final=isinstance(error, ConfigError | ModelError)))
        raise
    except Exception as error:
        tell(EngineFailed(f"{type(error).__name__}: {error}"))
        raise
    finally:
        socket.close()


def _serve_engine(
    member: _Member,
    store: dist.Store,
    orders: Orders,
    watch: StepWatch,
    socket: "zmq.Socket[bytes]",
    tell: Callable[[FromEngine], None],
) -> None:
    place = member.place
    loaded = load_rank(
        place,
        store,
        orders.config,
        lambda done, total: tell(Loading("weights", done, total)),
        lambda done, total: tell(Loading("CUDA graphs", done, total)),
        lambda done, total: tell(Loading("kernels", done, total)),
    )
    is_spread = place.local_size < place.size
    sender = StepSender(member.context, Path(orders.run_dir), place.size, host=member.host if is_spread else None)
    for rank, address in enumerate(sender.addresses, 1):
        store.set(_steps_key(rank), address)
    engine = make_engine(loaded, orders.config, sender, watch)

    def check_ranks() -> None:
        sender.send(IdleCheck())
        watch.begin()
        loaded.runner.compare_pasts()
        watch.end()

    check_ranks()  # everybody is loaded and hears rank 0
    tell(EngineReady(loaded.info))
    try:
        serve(engine, socket, Event(), when_idle=check_ranks)
        sender.send(Stop())
        loaded.leave()
    finally:
        sender.close()


def _run_other_rank(member: _Member) -> None:
    place = member.place
    store, orders = join(member.agent_store, CONFIGURE_TIMEOUT_S)
    with _watched(member, store, orders) as watch:
        loaded = load_rank(place, store, orders.config, lambda done, total: None)
        address = store.get(_steps_key(place.rank)).decode()
        follow(loaded, StepReceiver(member.context, Path(orders.run_dir), place.rank, address=address), watch)
        loaded.leave()


@contextmanager
def _watched(member: _Member, store: dist.Store, orders: Orders) -> Iterator[StepWatch]:
    """Meet the other ranks, and have them and this one watched; whatever goes wrong inside, the front end hears of."""
    place = member.place
    if place.host == orders.host:  # elsewhere, a pid means nothing
        when_gone(orders.front_end_pid, _die)
    cards = exchange_cards(store, place, Path(orders.config.model_dir))
    watch = StepWatch(
        member.context,
        place.rank,
        cards,
        pulse_address=orders.pulse_address,
        step_timeout_s=orders.config.step_timeout_s,
        stacks_claim=Path(orders.run_dir) / f"stacks-{cards[0].pid}",
    )
    watch.start()
    if member.termination is not None:
        drain = (lambda: os.kill(orders.front_end_pid, signal.SIGTERM)) if place.rank == 0 else (lambda: None)
        member.termination.may_drain(lambda: not watch.lost_neighbours(), drain)
    try:
        compare_cards(cards)
        yield watch
    except LeanServeError as error:
        is_final = isinstance(error, ConfigError | ModelError)
        watch.close(str(error), is_final=is_final)
        if is_final and place.host == orders.host:
            member.is_told.set()
        raise
    except Exception as error:
        watch.close(f"{type(error).__name__}: {error}")
        raise
    else:
        watch.close()


def _steps_key(rank: int) -> str:
    return f"leanserve/steps/{rank}"


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
