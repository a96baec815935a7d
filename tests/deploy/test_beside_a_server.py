"""Prometheus and nginx, as Debian packages them, with the files of deploy/ beside a server that runs."""

import json
import os
import re
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from live_server import LiveServer, free_port, live_server

pytestmark = [pytest.mark.system, pytest.mark.slow]

DEPLOY = Path(__file__).parents[2] / "deploy"
KEY = "a-key-for-this-test"


@contextmanager
def running(*command: str | Path, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(20)


def wait_for(what: Callable[[], Any], timeout_s: float) -> Any:
    """The first true thing that `what` returns."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if found := what():
                return found
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not within {timeout_s:g} s")


@contextmanager
def two_ranks(tmp_path: Path) -> Iterator[LiveServer]:
    environment = {"LEANSERVE_API_KEYS": KEY}
    arguments = ("--ranks", "2", "--kv-memory", "64MiB", "--step-timeout", "600")
    with live_server(*arguments, log=tmp_path / "server.log", environment=environment) as server:
        yield server


def ask(url: str, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{url}/v1/completions", headers=headers, json=body, timeout=60)


def signal_rank(server: LiveServer, rank: int, number: signal.Signals) -> None:
    """SIGSTOP: it does nothing for a while, as behind a network that is cut."""
    (pid,) = [seen["pid"] for seen in httpx.get(f"{server.url}/health").json()["ranks"] if seen["rank"] == rank]
    os.kill(pid, number)


def test_prometheus_fills_the_dashboard_and_fires_an_alert(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text(KEY)
    (tmp_path / "alerts.yml").write_text((DEPLOY / "prometheus" / "alerts.yml").read_text())
    address = f"127.0.0.1:{free_port()}"

    def query(path: str, **parameters: str) -> Any:
        return httpx.get(f"http://{address}/api/v1/{path}", params=parameters).json()["data"]

    with two_ranks(tmp_path) as server:
        text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        text = text.replace("/run/secrets/api-key", str(tmp_path / "api-key"))
        text = text.replace("leanserve:8000", server.url.removeprefix("http://")).replace("15s", "1s")
        (tmp_path / "prometheus.yml").write_text(text)
        with running(
            "prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}", log=tmp_path / "prometheus.log",
        ):  # fmt: skip
            wait_for(lambda: query("query", query='up{job="leanserve"} == 1')["result"], 30)
            assert ask(server.url, prompt="We sailed east", temperature=9).status_code == 400
            for _ in range(8):
                assert ask(server.url, prompt="We sailed east", max_tokens=8).status_code == 200
                time.sleep(1)

            dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "leanserve.json").read_text())
            for panel in dashboard["panels"]:
                for target in panel["targets"]:
                    expression = target["expr"].replace("$__rate_interval", "30s").replace("$model", ".*")
                    assert query("query", query=expression)["result"], f"{panel['title']}: {expression}"
            assert query("alerts")["alerts"] == []

            def firing() -> set[tuple[str, str]]:
                return {
                    (alert["labels"]["alertname"], alert["labels"].get("rank", ""))
                    for alert in query("alerts")["alerts"]
                    if alert["state"] == "firing"
                }

            signal_rank(server, 1, signal.SIGSTOP)
            wait_for(lambda: ("LeanServeRankSilent", "1") in firing(), 60)
            signal_rank(server, 1, signal.SIGCONT)
            wait_for(lambda: not firing(), 30)
            assert ask(server.url, prompt="We sailed east", max_tokens=8).status_code == 200


def test_nginx_carries_a_stream_whose_first_token_takes_longer_than_its_timeout(tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=llm.example.org",
         "-keyout", str(tmp_path / "privkey.pem"), "-out", str(tmp_path / "fullchain.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    port = free_port()
    with two_ranks(tmp_path) as server:
        site = (DEPLOY / "nginx" / "leanserve.conf").read_text()
        assert "proxy_read_timeout 60s;" in site
        site = site.replace("/etc/ssl/leanserve", str(tmp_path))
        site = site.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
        site = re.sub(r"listen \[::\]:443.*\n", "", site).replace("listen 443", f"listen 127.0.0.1:{port}")
        (tmp_path / "site.conf").write_text(site)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}} "
            f"http {{ access_log off; client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy; "
            f"fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s; "
            f"include {tmp_path}/site.conf; }}"
        )
        trusted = ssl.create_default_context(cafile=str(tmp_path / "fullchain.pem"))
        trusted.check_hostname = False
        with (
            running("nginx", "-c", tmp_path / "nginx.conf", log=tmp_path / "nginx.log"),
            httpx.Client(
                base_url=f"https://127.0.0.1:{port}",
                headers={"Authorization": f"Bearer {KEY}"},
                verify=trusted,
                timeout=120,
            ) as client,
        ):
            wait_for(lambda: client.get("/ready").status_code == 200, 20)
            assert client.get("/metrics").status_code == 403
            body = {"prompt": "We sailed east", "max_tokens": 8, "temperature": 0, "stream": True}
            signal_rank(server, 1, signal.SIGSTOP)
            started = time.monotonic()
            lines: list[str] = []
            with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200
                for line in response.iter_lines():
                    lines.append(line)
                    if time.monotonic() - started > 90 and not any(line.startswith("data:") for line in lines):
                        signal_rank(server, 1, signal.SIGCONT)
            first = next(i for i, line in enumerate(lines) if line.startswith("data:"))
            assert sum(line.startswith(":") for line in lines[:first]) >= 5
            assert sum(line.startswith("data: {") for line in lines) == 8
            assert [line for line in lines if line][-1] == "data: [DONE]"
