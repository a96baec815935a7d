"""A system under measurement: one or more processes that live through the whole grid and do one task at a time.

Systems take turns at every cell, so that a machine that grows busy or warm is so for all of them. One that waits sits
on its pipe and takes no processor time.
"""

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Self

import msgspec

from leanserve.bench.task import Task, Timing
from leanserve.contracts.errors import EngineError
from leanserve.launch.lifeline import when_gone

__all__ = ["System", "tasks_from"]

STOP_PATIENCE_S = 5.0


class System:
    """Processes that are started by `with` and ended after it.

    Args:
        name: for people and for the report.
        size: number of processes.
        run: the processes' main function, importable: `run(rank, connection, *arguments)`. Every process is told every
            task (`tasks_from(connection)`); rank 0 answers with a Timing.
    """

    def __init__(self, name: str, size: int, run: Callable[..., None], *arguments: object) -> None:
        self.name = name
        context = get_context("spawn")
        self._connections: list[Connection] = []
        self._theirs: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            self._connections.append(mine)
            self._theirs.append(theirs)
            process = context.Process(target=run, args=(rank, theirs, *arguments), name=f"{name}-{rank}", daemon=True)
            self._processes.append(process)

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        for theirs in self._theirs:
            theirs.close()
        return self

    def measure(self, task: Task) -> Timing:
        """Do one task.

        Raises:
            EngineError: a process of the system ended.
        """
        payload = msgspec.json.encode(task)
        try:
            for connection in self._connections:
                connection.send_bytes(payload)
            wait([self._connections[0], *(process.sentinel for process in self._processes)])
            if self._connections[0].poll():
                return msgspec.json.decode(self._connections[0].recv_bytes(), type=Timing)
        except (EOFError, BrokenPipeError):
            pass
        for process in self._processes:
            process.join(STOP_PATIENCE_S)
        codes = ", ".join(str(process.exitcode) for process in self._processes)
        raise EngineError(
            f"{self.name} ended while it measured {task.quantity} of {task.cell}; exit codes {codes} (-9 is what the "
            "kernel does when memory runs out: try fewer --batches or shorter --contexts)"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(STOP_PATIENCE_S if error is None else 0.0)
            if process.is_alive():
                process.terminate()
                process.join()


def tasks_from(connection: Connection) -> Iterator[Task]:
    """The tasks, until the other side closes the pipe. Ctrl-C is the other side's to handle.

    A process whose parent is gone ends at once, in the middle of a task too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    when_gone(os.getppid(), lambda: os._exit(1))
    while True:
        try:
            yield msgspec.json.decode(connection.recv_bytes(), type=Task)
        except EOFError:
            return
