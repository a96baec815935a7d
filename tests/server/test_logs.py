"""The log: one event a line, for people or as JSON, with the request's id and without its content."""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leanserve.server import logs
from leanserve.server.logs import RefusalLog, log_access, open_access_log, open_log, open_log_of_rank
from server.echo_engine import engine_info
from server.front_end import live_server, run, until

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def log_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("leanserve")
    access = logging.getLogger("leanserve.access")
    before = root.handlers, root.level, ours.level, access.level
    for name in ("LEANSERVE_LOG_LEVEL", "LEANSERVE_LOG_FORMAT"):
        monkeypatch.setenv(name, "")  # undone, whatever open_log sets
    yield
    root.handlers = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])
    access.setLevel(before[3])
    access.handlers, access.propagate = [], True


def events(capsys: Captured) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_have_the_facts_and_another_process_inherits_the_choice(capsys: Captured) -> None:
    open_log("warning", "json")
    assert (os.environ["LEANSERVE_LOG_LEVEL"], os.environ["LEANSERVE_LOG_FORMAT"]) == ("warning", "json")
    open_log_of_rank(rank=2)
    logger = logging.getLogger("leanserve.worker")
    logger.info("not told")
    logger.error("rank %d\nfell", 2, extra={"event": "rank_failed", "step": 7})
    (line,) = events(capsys)
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "error", "event": "rank_failed", "message": "rank 2\nfell", "rank": 2, "step": 7}


def test_requests_are_in_the_access_log_where_there_is_one(capsys: Captured, tmp_path: Path) -> None:
    open_log("info", "json")
    log_access(id="nobody asked")
    open_access_log(str(tmp_path / "access"))
    log_access(id="r1", status=200)
    assert capsys.readouterr().err == ""
    (line,) = (tmp_path / "access").read_text().splitlines()
    assert json.loads(line).items() >= {"id": "r1", "status": 200}.items()
    logging.getLogger("leanserve.access").handlers[0].close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's file that is full")
def test_an_access_log_on_a_full_disk_is_one_line(capsys: Captured) -> None:
    open_log("info", "json")
    open_access_log("/dev/full")
    for i in range(3):
        log_access(id=f"r{i}")
    with contextlib.suppress(OSError):
        logging.getLogger("leanserve.access").handlers[0].close()
    (line,) = events(capsys)
    assert (line["event"], line["lines"]) == ("access_log_failed", 1)
    assert "No space left" in line["message"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_an_exception_quotes_is_not_told(capsys: Captured, log_format: Any) -> None:
    prompt = "a secret"
    open_log("info", log_format)
    try:
        raise KeyError(prompt)
    except KeyError:
        logging.getLogger("asyncio").exception("task died\n%s", prompt)
        logging.getLogger("leanserve.server").exception("a task died")
    told = capsys.readouterr().err
    assert "asyncio: task died" in told
    assert told.count("KeyError") >= 2
    assert "test_what_an_exception_quotes" in told, "where it came from"
    assert prompt not in told


def test_refusals_are_told_at_once_and_then_counted(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    open_log("info", "json")
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    refusals = RefusalLog()
    for at in (100.0, 101.0, 102.0, 111.0):
        now[0] = at
        refusals.note(f"r{at:g}", "4 prompts are waiting")
    assert [(e["request_id"], e["others"]) for e in events(capsys)] == [("r100", 0), ("r111", 2)]


def test_probes_of_a_server_that_is_not_ready_are_no_lines(capsys: Captured) -> None:
    open_log("info", "json")

    async def scenario() -> None:
        async with live_server(None, ready=False) as live:
            assert (await live.http.get("/ready")).status_code == 503
            refused = await live.http.post("/v1/completions", json={"prompt": [5]}, headers={"X-Request-Id": "early"})
            assert refused.status_code == 503

    run(scenario())
    assert [e["request_id"] for e in events(capsys) if "refused" in e["message"]] == ["early"]


def test_a_full_queue_a_slow_reader_and_a_deadline_are_one_line_each(capsys: Captured) -> None:
    open_log("debug", "json")

    async def scenario() -> None:
        settings = {"max_live_requests": 1}
        async with live_server(None, max_queued_tokens=50, settings=settings) as live:
            stalled = {"prompt": [live.engine.stall_token], "max_tokens": 3}
            first = asyncio.create_task(
                live.http.post("/v1/completions", json=stalled, headers={"X-Request-Id": "late"})
            )
            await until(lambda: live.client.live_requests)
            refused = await live.http.post(
                "/v1/completions", json={"prompt": [5]}, headers={"X-Request-Id": "too-many"}
            )
            assert refused.status_code == 503
            (late,) = live.client.live
            late.stream.limit(0.01, None)
            assert (await first).status_code == 408
            await live.quiet()
            served = await live.http.post(
                "/v1/completions", json={"prompt": [5], "max_tokens": 2}, headers={"X-Request-Id": "good"}
            )
            assert served.status_code == 200

    run(scenario())
    all_told = events(capsys)
    admitted = {e["request_id"]: e["answer_id"] for e in all_told if e["event"] == "request_admitted"}
    told = {e["request_id"]: e for e in all_told if "request_id" in e and e["event"] != "request_admitted"}
    assert admitted == {name: told[name]["answer_id"] for name in ("late", "good")}
    assert {name: (event["event"], event["level"]) for name, event in told.items()} == {
        "too-many": ("request_refused", "warning"),
        "late": ("request_failed", "warning"),
        "good": ("request_ended", "debug"),
    }
    assert "the limit is 1" in told["too-many"]["message"]
    assert "waited 0.01 s for its turn" in told["late"]["message"]


def test_a_slow_reader_is_told(capsys: Captured) -> None:
    open_log("info", "json")

    async def scenario() -> None:
        info = engine_info(max_context_tokens=2_000_000)
        async with live_server(None, max_queued_tokens=500, tokens_per_output=200, step_s=0.001, info=info) as live:
            body = {"prompt": [5], "max_tokens": 1_000_000, "stream": True, "return_token_ids": True}
            headers = {"X-Request-Id": "slow"}
            async with live.http.stream("POST", "/v1/completions", json=body, headers=headers):
                await until(lambda: live.engine.aborts)

    run(scenario())
    (told,) = [event for event in events(capsys) if event.get("request_id") == "slow"]
    assert told["event"] == "request_failed"
    assert "tokens wait to be read; the request was stopped" in told["message"]
