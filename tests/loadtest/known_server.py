"""Starts the mock server for a test, and reads what it says it did."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOCK = Path(__file__).with_name("mock_server.py")


@dataclass
class KnownServer:
    url: str
    log: Path

    def sent_ns(self) -> dict[str, list[int]]:
        """By request id, when every chunk with tokens was written."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return {line["id"]: line["sent_ns"] for line in lines if line.get("id")}

    def frozen_ns(self) -> tuple[int, int]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        (found,) = [line["frozen_ns"] for line in lines if "frozen_ns" in line]
        return found[0], found[1]


@contextmanager
def known_server(tmp_path: Path, **defaults: object) -> Iterator[KnownServer]:
    log = tmp_path / "mock.jsonl"
    command = [sys.executable, str(MOCK), str(log), json.dumps({"ttft_ms": 50, "gap_ms": 10} | defaults)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            yield KnownServer(f"http://127.0.0.1:{port}", log)
        finally:
            process.kill()
