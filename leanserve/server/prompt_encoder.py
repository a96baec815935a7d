"""Texts to token ids, off the event loop: short ones in a few threads, long ones in a process of its own."""

import asyncio
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from leanserve.contracts.errors import EngineError
from leanserve.server.sidecar import Sidecar, SidecarEnded
from leanserve.server.tokenizer import Tokenizer

__all__ = ["PromptEncoder"]

_LONG_CHARS = 1 << 16
"""A thread that hands over the ids of a longer text would hold the GIL for more than a few milliseconds."""
_MAX_THREADS = 4
_WALL_S = 120.0


class PromptEncoder:
    """Tokenizes for many requests at once, never more of them than there are threads.

    Args:
        tokenizer: where it was not read from a directory, no process can read it again, and long texts take a thread.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="tokenizer")
        self._sidecar: Sidecar | None = None
        if tokenizer.directory is not None:
            directory = os.fsencode(tokenizer.directory)
            self._sidecar = Sidecar("leanserve.server.text_encoder", directory, _WALL_S)

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> "list[array[int]]":
        """int32 token ids of each text.

        Raises:
            OverloadedError: many others wait.
            EngineError: the process for long texts ended or took too long.
        """
        if self._sidecar is None or sum(map(len, texts)) < _LONG_CHARS:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._encode_here, texts, add_special_tokens)
        found: list[array[int]] = []
        for text in texts:
            try:
                answer = await self._sidecar.ask((b"\1" if add_special_tokens else b"\0") + text.encode())
            except SidecarEnded as error:
                raise EngineError("the tokenizer's process ended or took too long; send the request again") from error
            token_ids: array[int] = array("i")
            token_ids.frombytes(answer)
            found.append(token_ids)
        return found

    async def close(self) -> None:
        """End the threads and the process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._sidecar is not None:
            await self._sidecar.close()

    def _encode_here(self, texts: Sequence[str], add_special_tokens: bool) -> "list[array[int]]":
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [array("i", token_ids) for token_ids in encoded]
