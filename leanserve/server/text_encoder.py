"""A process that tokenizes long texts.

The library gives up the GIL while it works, but not while it hands over a list of a million ids; here that holds
nobody up. `python -m leanserve.server.text_encoder`; the first frame is the checkpoint's directory, each further one a
byte that says whether special tokens are added, and a text in UTF-8. The answer is int32, native byte order.
"""

import sys

import numpy as np

from leanserve.server.tokenizer import Tokenizer

__all__ = ["main"]


def main() -> None:
    """Serve until standard input ends."""
    orders, answers = sys.stdin.buffer, sys.stdout.buffer

    def answer(body: bytes) -> None:
        answers.write(len(body).to_bytes(4, "big"))
        answers.write(body)
        answers.flush()

    def next_order() -> bytes | None:
        head = orders.read(4)
        return orders.read(int.from_bytes(head, "big")) if len(head) == 4 else None

    directory = next_order()
    if directory is None:
        return
    tokenizer = Tokenizer.from_dir(directory.decode())
    assert tokenizer is not None, "whoever starts this has read it before"
    answer(b"")
    while (order := next_order()) is not None:
        token_ids = tokenizer.encode(order[1:].decode(), add_special_tokens=order[:1] == b"\1")
        answer(np.array(token_ids, dtype=np.int32).tobytes())


if __name__ == "__main__":
    main()
