"""What an engine's owner does when its own watch over the ranks fails."""

import asyncio
import logging
import signal

import pytest

from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import EngineError
from leanserve.launch import engine_group
from leanserve.launch.engine_group import EngineGroup
from leanserve.launch.run_dir import make_run_dir
from server.front_end import run


def group_without_ranks() -> EngineGroup:
    return EngineGroup(EngineConfig(model_dir="nowhere"), num_ranks=None, run_dir=make_run_dir())


def test_a_watch_that_breaks_ends_the_engine_with_the_reason(monkeypatch) -> None:
    async def scenario() -> None:
        group = group_without_ranks()

        def broken(now: float, *, patience_s: float = 0.0) -> dict[int, str]:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(group.client.health, "troubled", broken)
        await group.start()
        try:
            with pytest.raises(EngineError, match=r"task 'ranks' broke: OSError \(\[Errno 24\] Too many open files\)"):
                await asyncio.wait_for(group.wait_ready(), 60)
            assert group.client.engine.state == "failed"
        finally:
            await group.close()

    run(scenario())


def test_a_process_that_may_not_be_signalled_is_told_and_the_others_are_ended(monkeypatch, caplog) -> None:
    sent: list[int] = []

    def kill(pid: int, number: int) -> None:
        if pid == 1:
            raise PermissionError(1, "Operation not permitted")
        if pid == 2:
            raise ProcessLookupError
        sent.append(pid)

    monkeypatch.setattr(engine_group, "is_ours", lambda pid: True)
    monkeypatch.setattr(engine_group.os, "kill", kill)
    with caplog.at_level(logging.WARNING, "leanserve.launch"):
        engine_group._kill([1, 2, 3], signal.SIGKILL)
    assert sent == [3]
    assert [record.getMessage() for record in caplog.records] == [
        "process 1 cannot be sent SIGKILL: [Errno 1] Operation not permitted"
    ]
