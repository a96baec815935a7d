"""The step channel: rank 0 tells every rank the step, in order, and nothing is ever dropped.

One PUSH/PULL socket pair per rank, without a high-water mark, over `ipc://` in the run directory, or over TCP on one
address where ranks are on several machines. A rank with nothing to do waits here, on its socket, and never inside a
collective.
"""

from pathlib import Path

import msgspec
import zmq

from leanserve.contracts.batch import Batch, IdleCheck, Stop
from leanserve.contracts.errors import EngineError

__all__ = ["StepReceiver", "StepSender", "ToRank"]

ToRank = Batch | IdleCheck | Stop

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToRank).decode


def _address(run_dir: Path, rank: int) -> str:
    return f"ipc://{run_dir}/steps-{rank}"


class StepSender:
    """Rank 0's end.

    Args:
        host: an address of this machine, to serve ranks on other ones; None: over ipc in `run_dir`.
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", run_dir: Path, num_ranks: int, *, host: str | None = None
    ) -> None:
        self._sockets = []
        self.addresses: list[str] = []
        """Where rank 1, 2, ... connects."""
        for rank in range(1, num_ranks):
            socket = context.socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.LINGER, 1000)
            socket.bind(_address(run_dir, rank) if host is None else f"tcp://{host}:*")
            self._sockets.append(socket)
            self.addresses.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def send(self, message: ToRank) -> None:
        if not self._sockets:
            return
        payload = _encode(message)
        for socket in self._sockets:
            socket.send(payload)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()


class StepReceiver:
    """Every other rank's end.

    Args:
        address: from `StepSender.addresses`, where ranks are on several machines.
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", run_dir: Path, rank: int, *, address: str | None = None
    ) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address or _address(run_dir, rank))

    def receive(self, timeout_ms: int | None = None) -> ToRank | None:
        """The next step; waits for it without a limit (an idle server is the ordinary case), or returns None."""
        if timeout_ms is not None and not self._socket.poll(timeout_ms):
            return None
        payload = self._socket.recv()
        try:
            return _decode(payload)
        except msgspec.MsgspecError as error:
            raise EngineError(f"rank 0 sent a step message that cannot be read: {error}") from error

    def close(self) -> None:
        self._socket.close(linger=0)
