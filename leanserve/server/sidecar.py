"""A process beside the front end for what would hold its event loop or its GIL, or cannot be trusted.

Both sides talk in frames: four bytes of length, the most significant first, and a body.
"""

import asyncio
import contextlib
import sys

from leanserve.contracts.errors import OverloadedError

__all__ = ["Sidecar", "SidecarEnded"]

_MAX_WAITING = 256


class SidecarEnded(Exception):
    """The process ended, or did not answer in time and was ended. The next order starts another."""


class Sidecar:
    """Orders to `python -m module`, one at a time, each with one answer.

    An order that nobody waits for any more is still answered, so that answers stay with their orders.

    Args:
        setup: the first frame that the process gets; it is answered like the others.
        wall_s: for one order.
    """

    def __init__(self, module: str, setup: bytes, wall_s: float) -> None:
        self._module = module
        self._setup = setup
        self._wall_s = wall_s
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._exchanges: set[asyncio.Task[bytes]] = set()

    async def start(self) -> None:
        """Start the process before the first order needs it.

        Raises:
            SidecarEnded: it cannot be started.
        """
        await self._shielded(None)

    async def ask(self, order: bytes) -> bytes:
        """The answer to an order.

        Raises:
            SidecarEnded: there is none.
            OverloadedError: many other orders wait.
        """
        if len(self._exchanges) >= _MAX_WAITING:
            raise OverloadedError(f"{len(self._exchanges)} requests wait to be prepared; try again soon")
        return await self._shielded(order)

    async def close(self) -> None:
        """End the process; orders that wait fail."""
        for exchange in self._exchanges:
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        await self._end()

    async def _shielded(self, order: bytes | None) -> bytes:
        exchange = asyncio.create_task(self._exchange(order))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanged)
        return await asyncio.shield(exchange)

    def _exchanged(self, exchange: asyncio.Task[bytes]) -> None:
        self._exchanges.discard(exchange)
        if not exchange.cancelled():
            exchange.exception()  # somebody who has left does not want to know

    async def _exchange(self, order: bytes | None) -> bytes:
        async with self._lock:
            try:
                answer = b""
                if self._process is not None and self._process.returncode is not None:  # it ended between two orders
                    await self._end()
                if self._process is None:
                    self._process = await asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", self._module),
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE,
                        limit=1 << 20,
                        start_new_session=True,  # Ctrl-C is the front end's to handle
                    )
                    answer = await self._told(self._process, self._setup)
                return answer if order is None else await self._told(self._process, order)
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError, OSError) as error:
                await self._end()
                raise SidecarEnded from error
            except asyncio.CancelledError:
                await self._end()
                raise

    async def _told(self, process: asyncio.subprocess.Process, order: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        async with asyncio.timeout(self._wall_s):
            process.stdin.write(len(order).to_bytes(4, "big"))
            process.stdin.write(order)
            await process.stdin.drain()
            size = int.from_bytes(await process.stdout.readexactly(4), "big")
            return await process.stdout.readexactly(size)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
