"""A place for sockets, wherever temporary files go."""

import tempfile
from pathlib import Path

import pytest
import zmq

from leanserve.contracts.errors import ConfigError
from leanserve.launch.run_dir import make_run_dir, takes_sockets


@pytest.mark.parametrize("chars", [30, 200], ids=["short", "too-long-a-path"])
def test_every_socket_of_a_server_can_be_bound(monkeypatch, chars) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ls-") as short:
        parent = Path(short) / ("x" * chars)
        parent.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(parent))
        run_dir = make_run_dir()
        try:
            assert (run_dir.parent == parent) == takes_sockets(parent) == (chars == 30)
            assert run_dir.stat().st_mode & 0o777 == 0o700
            with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
                socket.bind(f"ipc://{run_dir}/steps-1023")
        finally:
            for left in run_dir.iterdir():
                left.unlink()
            run_dir.rmdir()


def test_no_place_at_all_is_a_clear_error(monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(ConfigError, match="set TMPDIR to a directory that can be written"):
        make_run_dir()
