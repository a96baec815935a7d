"""The server's own OpenAPI, attacked by schemathesis in process: no 5xx, nothing undocumented."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from leanserve.server.tokenizer import Tokenizer
from server.chat_templates import HERMES
from server.echo_engine import engine_info
from server.front_end import Live, live_server
from server.small_tokenizers import byte_level

SHORT = engine_info(max_context_tokens=64)


@contextlib.contextmanager
def server() -> Iterator[Live]:
    """A live server in a thread."""
    ready, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    found: list[Live] = []

    async def serve() -> None:
        async with live_server(Tokenizer(byte_level()), chat_template=HERMES, info=SHORT) as live:
            live.engine.disarm()
            found.append(live)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(20)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()


@pytest.mark.filterwarnings("default")  # schemathesis' own
def test_no_server_error_and_no_undocumented_status() -> None:
    with server() as live:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{live.port}/openapi.json")
        checks = [not_a_server_error, status_code_conformance]
        tried: dict[str, int] = {}
        for result in schema.get_all_operations():
            operation: Any = result.ok()

            @settings(max_examples=15, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def attack(case: Any) -> None:
                response = case.call(timeout=20)
                case.validate_response(response, checks=checks)
                tried[case.operation.label] = tried.get(case.operation.label, 0) + 1

            attack()
        assert {"POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "GET /metrics"} <= set(tried)
