"""`torchrun ... -m leanserve serve`: every process is a rank, and rank 0 also sees to a front end.

The front end lives in a session of its own (torchrun ends whole process groups), as long as torchrun's agent does. When
torchrun starts the ranks again, the new rank 0 finds the front end of the one before.
"""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from leanserve.contracts.errors import EngineError
from leanserve.launch.lifeline import is_alive
from leanserve.launch.own_address import address_towards
from leanserve.launch.place import Place
from leanserve.launch.run_dir import RUN_DIR_VARIABLE, make_run_dir
from leanserve.launch.threads import spin_briefly

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["AGENT_PID_VARIABLE", "PULSE_HOST_VARIABLE", "serve_under_torchrun", "started_by_torchrun"]

AGENT_PID_VARIABLE = "LEANSERVE_AGENT_PID"
"""Set for a front end that rank 0 started: the agent whose life it shares."""
PULSE_HOST_VARIABLE = "LEANSERVE_PULSE_HOST"
"""Set for it where ranks are on several machines: this one's address."""

_FRONT_END_KEY = "leanserve/front-end"
_OF_TORCHRUN = ("TORCHELASTIC_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_")


class _FrontEnd(msgspec.Struct, frozen=True):
    """What rank 0 leaves in the agent's store for the rank 0 after it."""

    host: str
    pid: int
    run_dir: str


def started_by_torchrun() -> bool:
    """This process is a rank of a user's own torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def serve_under_torchrun(arguments: list[str]) -> int:
    """Be one rank; rank 0 also starts the front end, with the same command line, unless there is one."""
    spin_briefly(os.environ)

    from leanserve.launch.rank import run_rank

    def attach_front_end(agent_store: "dist.Store") -> Path:
        place = Place.from_environment()
        if agent_store.check([_FRONT_END_KEY]):
            found = msgspec.json.decode(agent_store.get(_FRONT_END_KEY), type=_FrontEnd)
            if found.host != place.host:
                raise EngineError(f"the front end is on {found.host}, and rank 0 has moved to {place.host}")
            if is_alive(found.pid):
                return Path(found.run_dir)
        started = _start_front_end(place, arguments)
        agent_store.set(_FRONT_END_KEY, msgspec.json.encode(started).decode())
        return Path(started.run_dir)

    return run_rank(attach_front_end)


def _start_front_end(place: Place, arguments: list[str]) -> _FrontEnd:
    run_dir = make_run_dir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_OF_TORCHRUN)}
    environment |= {RUN_DIR_VARIABLE: str(run_dir), AGENT_PID_VARIABLE: str(place.agent_pid)}
    if place.local_size < place.size:
        environment[PULSE_HOST_VARIABLE] = address_towards(os.environ["MASTER_ADDR"])
    process = subprocess.Popen(
        [sys.executable, "-m", "leanserve", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )

    def watch() -> None:
        # A front end that cannot start has said why; the rank goes with it, and torchrun ends the others.
        exit_code = process.wait()
        if exit_code != 0:
            shutil.rmtree(run_dir, ignore_errors=True)
            os._exit(exit_code if exit_code > 0 else 1)

    threading.Thread(target=watch, name="front end", daemon=True).start()
    return _FrontEnd(place.host, process.pid, str(run_dir))
