"""What the front end costs: chunks a second beside a bare emitter, the idle time to a first chunk, long prompts.

The server, the engine without a model, and the clients are three processes; the server has one core for itself where
there are several.
"""

import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from leanserve.bench.frontend_server import LONGEST_HOLD_PATH
from leanserve.bench.machine import Machine, describe_machine, load_average
from leanserve.contracts.errors import EngineError

__all__ = ["FrontendFigures", "print_frontend_figures", "run_frontend_bench", "write_frontend_figures"]

_FIRST_CHUNKS = 50
_LONG_IDS = 1_000_000
_LONG_TEXT_BYTES = 4 << 20
_REPEATS = 3


class FrontendFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, best of three where it is a time or a rate."""

    machine: Machine
    load_average_after: float
    streams: int
    tokens: int
    """Of each stream."""
    chunks_per_s: float
    bare_chunks_per_s: float
    """A StreamingResponse that yields ready bytes, same server, same streams."""
    first_chunk_ms: float
    """Median of 50 requests, one after the other."""
    million_ids_ms: float
    """From the first byte of the request to the first chunk of the answer."""
    million_ids_hold_ms: float
    """Longest hold of the event loop meanwhile."""
    long_text_ms: float
    """4 MiB of text, in the same way."""
    long_text_hold_ms: float

    @property
    def ratio(self) -> float:
        return self.chunks_per_s / self.bare_chunks_per_s


def run_frontend_bench(streams: int, tokens: int, console: Console) -> FrontendFigures:
    """Measure.

    Raises:
        EngineError: a process of the benchmark did not start or ended.
    """
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="ls-") as directory:
        address = f"ipc://{directory}/engine"
        rates: dict[str, float] = {"bare": 0.0, "leanserve": 0.0}
        with (
            _server("bare", address, tokens) as bare,
            _engine(address, streams),
            _server("leanserve", address, tokens) as ours,
        ):
            for _ in range(_REPEATS):  # in turn, so that what else the machine does falls on both
                for kind, port in (("bare", bare), ("leanserve", ours)):
                    console.print(f"{streams} streams, {kind}", style="dim")
                    rates[kind] = max(rates[kind], asyncio.run(_chunks_per_s(port, streams, tokens)))
            console.print("one request at a time", style="dim")
            body = json.dumps({"prompt": [300, 301], "max_tokens": 1, "stream": True}).encode()
            first = [asyncio.run(_first_chunk_s(ours, body)) for _ in range(_FIRST_CHUNKS)]
            console.print("long prompts", style="dim")
            ids = {"prompt": [random.randrange(512) for _ in range(_LONG_IDS)], "max_tokens": 1, "stream": True}
            text = {"prompt": ("We sailed east é. " * _LONG_TEXT_BYTES)[: _LONG_TEXT_BYTES - 240_000], "stream": True}
            million = asyncio.run(_long(ours, json.dumps(ids).encode()))
            long_text = asyncio.run(_long(ours, json.dumps({**text, "max_tokens": 1}, ensure_ascii=False).encode()))
    return FrontendFigures(
        machine=machine,
        load_average_after=load_average(),
        streams=streams,
        tokens=tokens,
        chunks_per_s=rates["leanserve"],
        bare_chunks_per_s=rates["bare"],
        first_chunk_ms=statistics.median(first) * 1000,
        million_ids_ms=million[0] * 1000,
        million_ids_hold_ms=million[1] * 1000,
        long_text_ms=long_text[0] * 1000,
        long_text_hold_ms=long_text[1] * 1000,
    )


def print_frontend_figures(figures: FrontendFigures, console: Console) -> None:
    table = Table("front end", "measured", "beside", box=None)
    table.add_row(
        f"chunks/s, {figures.streams} streams",
        f"{figures.chunks_per_s:,.0f}",
        f"{figures.ratio:.2f} of a bare StreamingResponse ({figures.bare_chunks_per_s:,.0f})",
    )
    table.add_row("idle, to the first chunk", f"{figures.first_chunk_ms:.1f} ms", "")
    for name, took, hold in (
        ("1,000,000 ids accepted", figures.million_ids_ms, figures.million_ids_hold_ms),
        ("4 MB of text accepted", figures.long_text_ms, figures.long_text_hold_ms),
    ):
        table.add_row(name, f"{took:.0f} ms", f"the event loop was held {hold:.1f} ms at most")
    console.print(table)


def write_frontend_figures(figures: FrontendFigures, folder: Path) -> None:
    """Write frontend.json into `folder`."""
    (folder / "frontend.json").write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n")


@contextmanager
def _child(*arguments: str) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _server(kind: str, address: str, tokens: int) -> Iterator[int]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    core = cores[-1] if len(cores) > 1 else -1
    with _child("leanserve.bench.frontend_server", kind, address, str(tokens), str(core)) as process:
        assert process.stdout is not None
        port = process.stdout.readline()
        if not port:
            raise EngineError(f"the server under measurement ({kind}) did not start; it has said why above")
        yield int(port)


@contextmanager
def _engine(address: str, streams: int) -> Iterator[None]:
    with _child("leanserve.bench.frontend_engine", address, str(streams)):
        yield


def _post(body: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def _chunks_per_s(port: int, streams: int, tokens: int) -> float:
    """All chunks of all streams, by the time from the first of them to the last."""
    body = json.dumps({"prompt": [300, 301], "max_tokens": tokens, "stream": True, "temperature": 0}).encode()
    firsts: list[float] = []
    counts: list[int] = []

    async def read() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(_post(body))
        count, held = 0, b""
        while part := await reader.read(1 << 18):
            held += part
            if count == 0 and b"data: " in held:
                firsts.append(time.perf_counter())
            count += held.count(b"data: {")
            held = held[-6:] if not held.endswith(b"data: {") else b""
        counts.append(count)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    await asyncio.gather(*(read() for _ in range(streams)))
    took = time.perf_counter() - min(firsts)
    if sum(counts) != streams * tokens:
        raise EngineError(f"{sum(counts)} chunks came, {streams * tokens} were asked for")
    return sum(counts) / took


async def _first_chunk_s(port: int, body: bytes) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.perf_counter()
    writer.write(_post(body))
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise EngineError(f"the server answered {(head + await reader.read()).decode(errors='replace')[:400]}")
    await reader.readuntil(b"data: ")
    took = time.perf_counter() - began
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return took


async def _longest_hold_s(port: int) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {LONGEST_HOLD_PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])["longest_s"]


async def _long(port: int, body: bytes) -> tuple[float, float]:
    """Seconds to the first chunk, and the longest hold meanwhile."""
    took: list[float] = []
    holds: list[float] = []
    for _ in range(_REPEATS):
        await asyncio.sleep(0.2)
        await _longest_hold_s(port)
        took.append(await _first_chunk_s(port, body))
        holds.append(await _longest_hold_s(port))
    return min(took), min(holds)
