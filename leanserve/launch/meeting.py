"""How the ranks of one attempt find each other: a store of their own, named in the agent's store.

torchrun keeps one store over all its restarts, and what a dead attempt left there leads the next one astray. So rank 0
opens a fresh TCPStore for every attempt and publishes its address in the agent's; the others read it again and again
until it is the one of a living rank 0. (Restart counters are of no use: they differ between the agents of several
machines.) Then each rank lays down its card, and they compare.
"""

import hashlib
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from secrets import token_hex

import msgspec
import torch
import torch.distributed as dist

from leanserve import __version__
from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import ConfigError, EngineError
from leanserve.launch.own_address import address_towards, interface_of
from leanserve.launch.place import Place

__all__ = ["Card", "Orders", "compare_cards", "convene", "exchange_cards", "join", "reach_agent"]

_ADDRESS_KEY = "leanserve/meeting"
_NONCE_KEY = "leanserve/attempt"
_ORDERS_KEY = "leanserve/orders"
_LOOPBACK = "127.0.0.1"
_PROBE_S = 2.0
_REREAD_S = 0.1
_CARDS_TIMEOUT_S = 120.0
"""Between the first rank that is there and the last."""


class Orders(msgspec.Struct, frozen=True):
    """What rank 0 passes on to the others."""

    config: EngineConfig
    host: str
    """The machine of rank 0 and of the front end."""
    run_dir: str
    """On that machine."""
    front_end_pid: int
    """On that machine."""
    pulse_address: str


class Card(msgspec.Struct, frozen=True):
    """What a rank lets the others know of itself."""

    rank: int
    pid: int
    host: str
    agent_pid: int
    leanserve: str
    torch: str
    model: str
    """A fingerprint of the checkpoint."""


def reach_agent(place: Place, timeout_s: float) -> tuple[dist.TCPStore, str]:
    """The agent's store, and the address under which the others reach this machine; Gloo is bound to that one."""
    agent_host = os.environ["MASTER_ADDR"]
    store = dist.TCPStore(
        agent_host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=timeout_s)
    )
    host = _LOOPBACK if place.local_size == place.size else address_towards(agent_host)
    interface = interface_of(host)
    if interface is not None:  # else torch looks up the machine's name, which may lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return store, host


def convene(agent_store: dist.Store, host: str, orders: Orders, timeout_s: float) -> dist.TCPStore:
    """Rank 0: open the attempt's store on `host`, an address of this machine, and let the others know of it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),  # one address only: by itself it would listen on all
        )
    nonce = token_hex(8)
    store.set(_ORDERS_KEY, msgspec.json.encode(orders).decode())
    store.set(_NONCE_KEY, nonce)
    agent_store.set(_ADDRESS_KEY, f"{host} {port} {nonce}")
    return store


def join(agent_store: dist.Store, timeout_s: float) -> tuple[dist.TCPStore, Orders]:
    """Every other rank: find the attempt's store. Waits as long as rank 0 needs, a download of the model included."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        host, port, nonce = agent_store.get(_ADDRESS_KEY).decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_PROBE_S))
            if store.get(_NONCE_KEY).decode() == nonce:
                store.set_timeout(timedelta(seconds=timeout_s))
                return store, msgspec.json.decode(store.get(_ORDERS_KEY), type=Orders)
        except (OSError, dist.DistError):
            pass  # of an attempt that is gone
        time.sleep(_REREAD_S)
    raise EngineError(f"rank 0 has not opened a store for this attempt within {timeout_s:.0f} s")


def exchange_cards(store: dist.Store, place: Place, model_dir: Path) -> list[Card]:
    """Lay down this rank's card and wait for everybody's, by rank."""
    mine = Card(
        rank=place.rank,
        pid=os.getpid(),
        host=place.host,
        agent_pid=place.agent_pid,
        leanserve=__version__,
        torch=str(torch.__version__),
        model=_model_fingerprint(model_dir),
    )
    store.set(f"leanserve/card/{place.rank}", msgspec.json.encode(mine).decode())
    keys = [f"leanserve/card/{rank}" for rank in range(place.size)]
    store.wait(keys, timedelta(seconds=_CARDS_TIMEOUT_S))
    return [msgspec.json.decode(store.get(key), type=Card) for key in keys]


def compare_cards(cards: list[Card]) -> None:
    """Raises: ConfigError for the first rank that runs other software, or another model, than rank 0."""
    first = cards[0]
    for card in cards[1:]:
        for what, name in (("leanserve", "leanserve"), ("torch", "torch"), ("the model", "model")):
            ours, theirs = getattr(first, name), getattr(card, name)
            if ours != theirs:
                raise ConfigError(
                    f"rank {card.rank} on {card.host} has {what} {theirs}, rank 0 on {first.host} has {ours}; "
                    "every rank must have the same"
                )


def _model_fingerprint(model_dir: Path) -> str:
    """Of config.json and of the names and sizes of the weight files: what tells two checkpoints apart at no cost."""
    digest = hashlib.sha256()
    try:
        digest.update((model_dir / "config.json").read_bytes())
        for path in sorted(model_dir.glob("*.safetensors")):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    except OSError as error:
        return f"unreadable ({error})"
    return digest.hexdigest()[:12]
