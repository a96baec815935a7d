"""Nobody without a key gets past the gate, whatever the path looks like."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from leanserve.contracts.errors import ConfigError
from leanserve.server.app import create_app
from leanserve.server.auth import key_digests, read_key_file
from leanserve.server.engine_client import EngineClient
from leanserve.server.settings import ServerSettings
from server.front_end import Live, live_server, run, until
from server.test_http import is_error, sent

KEY, OTHER = "sk-first-key-0001", "sk-other-key-0002"
GUARDED: dict[str, Any] = {"key_digests": key_digests([KEY, OTHER])}
BEARER = {"Authorization": f"Bearer {KEY}"}
OPEN = {"/health", "/ready", "/ping"}

PATH_TRICKS = [
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/v1/../health",
    "/health/../v1/models",
    "/health/",
    "//health",
    "/health//",
    "/health%2f..%2fv1%2fmodels",
    "/health%2F",
    "/%2e%2e/health",
    "/health%00",
    "/health;/v1/models",
    "/ready%3f/../v1/models",
    "/HEALTH",
    "/ping.json",
    "/./v1/models",
    "/v1\\models",
    "/%252e%252e/v1/models",
    "*",
]


def routes_of() -> list[tuple[str, str]]:
    app = create_app(EngineClient("ipc:///nowhere"), None, ServerSettings(model_names=("m",), **GUARDED))
    found: list[tuple[str, str]] = []

    def walk(routes: list[Any]) -> None:
        for route in routes:
            if hasattr(route, "original_router"):  # newer versions of FastAPI keep an included router whole
                walk(route.original_router.routes)
                continue
            assert isinstance(route, Route | APIRoute), f"{route!r} is of a kind that this test cannot walk"
            found.extend((method, route.path) for method in sorted(route.methods or ()))

    walk(app.routes)
    return found


async def raw(live: Live, method: str, target: str, headers: str = "") -> int:
    """The status of a request whose target goes over the wire as it stands."""
    request = f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n".encode()
    async with sent(live, request) as (reader, _):
        answer = await reader.read()
    return int(answer.split()[1])


def test_every_route_but_the_named_few_wants_a_key() -> None:
    async def scenario() -> None:
        async with live_server(None, settings=GUARDED) as live:
            walked = routes_of()
            assert {"/v1/completions", "/metrics", "/", "/openapi.json", "/v1/models/{model_id:path}"} <= {
                path for _, path in walked
            }
            for method, path in walked:
                status = await raw(live, method, path.replace("{model_id:path}", "echo"))
                assert (status in (200, 405)) if path in OPEN else status == 401, (method, path, status)
            assert {path for _, path in walked} >= OPEN

    run(scenario())


def test_no_trick_with_the_path_the_method_or_the_header_passes() -> None:
    async def scenario() -> None:
        async with live_server(None, settings=GUARDED) as live:
            for target in PATH_TRICKS:
                for method in ("GET", "POST", "OPTIONS", "HEAD"):
                    status = await raw(live, method, target)
                    assert status in (400, 401), (method, target, status)
            for host_form in (
                f"http://127.0.0.1:{live.port}/v1/models",
                "http://x/health/../v1/models",
                "http://x/v1/models?/health",
                "http://health",
                "http:///health/",
                "http://x//health",
                "http%3a//x/health",
                "/http://x/health",
            ):
                assert await raw(live, "GET", host_form) in (400, 401), host_form
            for headers in (
                "Authorization: Bearer\r\n",
                "Authorization: Bearer \r\n",
                f"Authorization: Basic {KEY}\r\n",
                f"Authorization: {KEY}\r\n",
                f"Authorization: Bearer {KEY}x\r\n",
                f"Authorization: Bearer {KEY[:-1]}\r\n",
                f"Authorization: Bearer {KEY.upper()}\r\n",
                f"Authorization: Bearer {KEY},{OTHER}\r\n",
                f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer {OTHER}\r\n",
                f"X-Forwarded-For: 127.0.0.1\r\nX-Original-URL: /health\r\nCookie: key={KEY}\r\n",
                "Authorization: Bearer " + "é" * 20 + "\r\n",
            ):
                assert await raw(live, "GET", "/v1/models", headers) == 401, headers
            assert await raw(live, "GET", f"/v1/models?api_key={KEY}") == 401
            for headers in (f"Authorization: Bearer {KEY}\r\n", f"authorization: bearer  {OTHER}\r\n"):
                assert await raw(live, "GET", "/v1/models", headers) == 200

    run(scenario())


def test_a_refusal_is_our_error_and_the_body_is_not_read() -> None:
    async def scenario() -> None:
        async with live_server(None, settings=GUARDED) as live:
            refused = await live.http.post("/v1/completions", content=b"x" * 1_000_000)
            assert is_error(refused, 401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
            assert KEY not in refused.text
            page = await live.http.get("/")
            assert page.status_code == 401
            assert page.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert (await live.http.get("/", headers=BEARER)).status_code == 200
            answer = await live.http.post("/v1/completions", json={"prompt": [5]}, headers=BEARER)
            assert answer.status_code == 200

    run(scenario())


def test_one_key_has_so_many_requests_in_flight_and_others_go_on() -> None:
    async def scenario() -> None:
        async with live_server(None, settings={**GUARDED, "max_requests_per_key": 2}) as live:
            stalled = {"prompt": [live.engine.stall_token], "stream": True}
            held = [
                asyncio.create_task(live.http.post("/v1/completions", json=stalled, headers=BEARER)) for _ in range(2)
            ]
            await until(lambda: len(live.engine.running) == 2)
            refused = await live.http.post("/v1/completions", json={"prompt": [5]}, headers=BEARER)
            assert is_error(refused, 429, "rate_limit_exceeded")
            assert "2 requests in flight" in refused.text
            assert refused.headers["retry-after"] == "1"
            assert (await live.http.get("/v1/models", headers=BEARER)).status_code == 200
            other = {"Authorization": f"Bearer {OTHER}"}
            assert (await live.http.post("/v1/completions", json={"prompt": [5]}, headers=other)).status_code == 200
            for task in held:
                task.cancel()
            await live.quiet()
            again = await live.http.post("/v1/completions", json={"prompt": [5]}, headers=BEARER)
            assert again.status_code == 200

    run(scenario())


def test_other_sites_may_ask_only_when_named() -> None:
    async def scenario() -> None:
        asks = {
            "Origin": "https://chat.example.org",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        async with live_server(None) as live:
            answer = await live.http.options("/v1/completions", headers=asks)
            assert answer.status_code == 405
            assert not [name for name in answer.headers if name.startswith("access-control")]
        settings = {**GUARDED, "cors_origins": ("https://chat.example.org",)}
        async with live_server(None, settings=settings) as live:
            answer = await live.http.options("/v1/completions", headers=asks)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"
            assert (
                await live.http.options("/v1/completions", headers={**asks, "Origin": "https://x"})
            ).status_code == 400
            for given in ({}, BEARER):  # a page may read why it was refused
                answer = await live.http.get("/v1/models", headers={"Origin": "https://chat.example.org", **given})
                assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"
            assert "access-control-allow-origin" not in (await live.http.get("/ping")).headers

    run(scenario())


def test_the_log_tells_keys_apart_and_keeps_them(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with live_server(None, settings=GUARDED) as live:
            await live.http.get("/v1/models", headers=BEARER)
            await live.http.get("/v1/models", headers={"Authorization": "Bearer not-a-key-at-all"})

    with caplog.at_level("INFO", logger="leanserve.access"):
        run(scenario())
    let_in, refused = [json.loads(r.getMessage()) for r in caplog.records if r.name == "leanserve.access"]
    assert (let_in["status"], let_in["key"]) == (200, GUARDED["key_digests"][0].hex()[:8])
    assert (refused["status"], refused["key"], refused["error"]) == (401, None, "invalid_api_key")
    assert "not-a-key" not in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["short", "with space in it", "ключ-длинный", "x" * 513, ""])
def test_keys_that_no_client_can_send_are_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match="API key number 2") as caught:
        key_digests([KEY, key])
    assert not key or key not in str(caught.value)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n  {OTHER}  \n")
    assert read_key_file(path) == [KEY, OTHER]
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_key_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_file(tmp_path / "missing")


def test_wrong_settings_say_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"scheme and host"):
        ServerSettings(model_names=("m",), cors_origins=("chat.example.org",))
    with pytest.raises(ConfigError, match="at least 1"):
        ServerSettings(model_names=("m",), max_requests_per_key=0)
