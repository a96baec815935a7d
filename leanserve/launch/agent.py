"""The agent: torchrun as a child of the front end, quiet, tied to the front end's life.

Run by `RanksProcess`; not for people. On machines without a front end it is the process that `leanserve serve
--node-rank N` starts.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile

from leanserve.launch.lifeline import when_gone
from leanserve.launch.nodes import Nodes
from leanserve.launch.place import NODE_RANK_VARIABLE
from leanserve.launch.run_dir import RUN_DIR_VARIABLE
from leanserve.launch.threads import spin_briefly
from leanserve.server.logs import open_log_of_rank

__all__ = ["WITHOUT_LIMIT", "run_agent"]

logger = logging.getLogger("leanserve.launch")

WITHOUT_LIMIT = 1_000_000
"""Restarts: the front end counts them, and ends the agent."""
JOIN_TIMEOUT_S = 7 * 24 * 3600
"""How long the others wait for a machine that went away."""


def run_agent(num_ranks: int, nodes: Nodes, *, module: str = "rank", max_restarts: int = WITHOUT_LIMIT) -> int:
    """Start this machine's ranks, as often as it takes, and wait for them. Returns the exit code.

    Args:
        module: of this package, what a rank runs.
    """
    open_log_of_rank()
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torchrun's own log; ours says what failed
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stores complain at length when their other end dies
    spin_briefly(os.environ)
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.propagate = False
    elastic.addHandler(_FailedRanks())

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    arguments = [f"--nproc-per-node={num_ranks}", f"--max-restarts={max_restarts}", "--rdzv-backend=c10d"]
    if nodes.count == 1:
        arguments += ["--nnodes=1", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        from leanserve.launch.own_address import address_towards

        os.environ[NODE_RANK_VARIABLE] = str(nodes.rank)
        arguments += [
            f"--nnodes={nodes.count}",
            f"--rdzv-endpoint={nodes.endpoint}",
            f"--rdzv-conf=is_host={int(nodes.rank == 0)},join_timeout={JOIN_TIMEOUT_S}",
            "--rdzv-id=leanserve",
            f"--local-addr={address_towards(nodes.host)}",
        ]
    try:
        with _own_directory() as own_files:
            torchrun([*arguments, f"--log-dir={own_files}", "-m", f"leanserve.launch.{module}"])
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            _tell(f"rank {rank}", failure.pid, failure.exitcode)
        return 1
    except SignalException:
        return 0
    return 0


def _own_directory() -> "tempfile.TemporaryDirectory[str]":
    """For files that torchrun makes, and leaves: with the server's sockets, where there are any."""
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    return tempfile.TemporaryDirectory(prefix="agent-", dir=run_dir, ignore_cleanup_errors=True)


class _FailedRanks(logging.Handler):
    """Of all that torchrun has to say, which rank failed and how."""

    def emit(self, record: logging.LogRecord) -> None:
        match record.args:
            case (int(exit_code), int(local_rank), int(pid), _) if "exitcode" in str(record.msg):
                _tell(f"local rank {local_rank}", pid, exit_code)


def _tell(who: str, pid: int, exit_code: int) -> None:
    extra = {"event": "rank_ended", "pid": pid, "exit_code": exit_code}
    logger.error("%s (pid %d) %s; all ranks are ended", who, pid, _ended(exit_code), extra=extra)


def _ended(exit_code: int) -> str:
    if exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _end_alone() -> None:
    """The front end is gone, and could not clear up."""
    shutil.rmtree(os.environ[RUN_DIR_VARIABLE], ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    num_ranks, front_end_pid, num_nodes, endpoint, module, max_restarts = sys.argv[1:]
    when_gone(int(front_end_pid), _end_alone)
    nodes = Nodes(count=int(num_nodes), endpoint=endpoint or None)
    sys.exit(run_agent(int(num_ranks), nodes, module=module, max_restarts=int(max_restarts)))
