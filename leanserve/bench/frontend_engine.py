"""An engine that costs nothing: every request gets a token each step, and steps follow one another at once.

`python -m leanserve.bench.frontend_engine ADDRESS`; it ends with its standard input.
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
    socket.connect(sys.argv[1])
    socket.send(encode(EngineReady(_info())))
    left: dict[str, int] = {}
    step = 0
    while True:
        while socket.poll(0 if left else None):
            match decode_to_engine(socket.recv()):
                case Submit() as request:
                    left[request.request_id] = request.sampling.max_tokens
                case Abort(request_id=request_id):
                    left.pop(request_id, None)
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
