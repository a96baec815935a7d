"""The agent: torchrun as a child of the front end, with its tracebacks turned into one line per failed rank.

Run as `python -m leanserve.launch.agent RANKS FRONT_END_PID`; not for people.
"""

import os
import signal
import sys

from leanserve.launch.lifeline import when_gone

__all__ = ["main"]


def main(num_ranks: int, front_end_pid: int) -> int:
    """Start the ranks and wait for them. Returns the exit code: 0 when all ended in an orderly way."""
    when_gone(front_end_pid, lambda: os.kill(os.getpid(), signal.SIGTERM))
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torchrun's own log; ours says what failed

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    arguments = [
        "--nnodes=1",
        f"--nproc-per-node={num_ranks}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
        "-m",
        "leanserve.launch.rank",
    ]
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            print(f"leanserve: rank {rank} (pid {failure.pid}) {_ended(failure.exitcode)}", file=sys.stderr)
        return 1
    except SignalException:
        return 0
    return 0


def _ended(exit_code: int) -> str:
    if exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
