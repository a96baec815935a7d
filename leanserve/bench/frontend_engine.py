"""An engine that costs nothing: every request gets a token each step, and steps follow one another at once.

`python -m leanserve.bench.frontend_engine ADDRESS STREAMS`; it ends with its standard input. Requests for more than one
token begin when STREAMS of them are there: else the first would be over before the second has come, and what is meant
to be many streams would be one after the other.
"""

import sys
import threading
from os import _exit

import zmq

from leanserve.contracts.messages import (
    Abort,
    EngineInfo,
    EngineReady,
    Submit,
    TokenOutput,
    TokenOutputs,
    decode_to_engine,
    encode,
)

__all__ = ["main"]

CONTEXT_TOKENS = 8_000_000


def _info() -> EngineInfo:
    return EngineInfo(
        architecture="none",
        vocab_size=65536,
        eos_token_ids=(),
        max_context_tokens=CONTEXT_TOKENS,
        model_max_tokens=CONTEXT_TOKENS,
        page_tokens=64,
        pages_per_rank=(CONTEXT_TOKENS // 64,),
        kv_bytes_per_token=0,
        dtype="none",
        device="none",
        attention="none",
    )


def main() -> None:
    threading.Thread(target=lambda: (sys.stdin.read(), _exit(0)), daemon=True).start()
    socket = zmq.Context().socket(zmq.DEALER)
    socket.set_hwm(0)
    address, streams = sys.argv[1], int(sys.argv[2])
    socket.connect(address)
    socket.send(encode(EngineReady(_info())))
    left: dict[str, int] = {}
    gathering: dict[str, int] = {}
    step = 0
    while True:
        while socket.poll(0 if left else None):
            match decode_to_engine(socket.recv()):
                case Submit() as request:
                    num_tokens = request.sampling.max_tokens
                    (left if num_tokens == 1 else gathering)[request.request_id] = num_tokens
                    if len(gathering) == streams:
                        left |= gathering
                        gathering.clear()
                case Abort(request_id=request_id):
                    left.pop(request_id, None)
                    gathering.pop(request_id, None)
                case _:
                    pass
        step += 1
        outputs: list[TokenOutput] = []
        for request_id in list(left):
            left[request_id] -= 1
            is_last = left[request_id] == 0
            outputs.append(TokenOutput(request_id, [100 + step % 256], "length" if is_last else None))
            if is_last:
                del left[request_id]
        socket.send(encode(TokenOutputs(step, outputs, len(left), 0, (len(left),), 0)))


if __name__ == "__main__":
    main()
