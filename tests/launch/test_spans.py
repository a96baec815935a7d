"""Spans leave a real server for a real collector's port, and nobody who did not ask for them pays for them."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from leanserve.contracts.errors import ConfigError
from leanserve.launch.spans import open_tracing
from live_server import live_server

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Collector(ThreadingHTTPServer):
    """Keeps what is posted to it as OTLP over HTTP."""

    def __init__(self) -> None:
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), _Receive)


class _Receive(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        assert self.headers["content-type"] == "application/x-protobuf"
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_servers_spans_reach_a_collector(tmp_path: Path) -> None:
    with collector() as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = {"LEANSERVE_OTLP_ENDPOINT": endpoint, "OTEL_SERVICE_NAME": "harbour"}
        arguments = ("--ranks", "1", "--kv-memory", "8MiB")
        with live_server(*arguments, log=tmp_path / "log", environment=environment) as live:
            assert live.post(prompt="We sailed east", max_tokens=4, temperature=0).status_code == 200
            assert live.stop() == 0  # sends what it has not sent yet
    assert f"spans go to {endpoint}/v1/traces" in (tmp_path / "log").read_text()
    assert {path for path, _ in server.received} == {"/v1/traces"}
    resources = [resource for _, batch in server.received for resource in batch.resource_spans]
    services = {a.value.string_value for r in resources for a in r.resource.attributes if a.key == "service.name"}
    assert services == {"harbour"}
    spans = {span.name: span for r in resources for scope in r.scope_spans for span in scope.spans}
    assert spans.keys() == {"POST /v1/completions", "prepare", "queue", "prefill", "decode"}
    told = {a.key: a.value for a in spans["POST /v1/completions"].attributes}
    assert told["gen_ai.usage.output_tokens"].int_value == 4
    assert told["gen_ai.request.model"].string_value == "leanserve-bundled"
    assert {span.parent_span_id for span in spans.values()} == {b"", spans["POST /v1/completions"].span_id}


def test_a_server_without_spans_imports_no_sdk() -> None:
    code = (
        "import sys, leanserve.launch.front_end as f; assert f.open_tracing(None) is None; "
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_the_extra_is_asked_for_where_the_option_is_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'leanserve\[otel\]'"):
        open_tracing("http://127.0.0.1:4318")
    monkeypatch.setenv(VARIABLES[0], "http://127.0.0.1:4318")  # perhaps for other programs
    with caplog.at_level(logging.WARNING, "leanserve.launch"):
        assert open_tracing(None) is None
    assert "no spans" in caplog.text


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:4318", "base URL"),
        ("grpc://host:4317", "base URL"),
        ("http://", "base URL"),
        ("http://host:99999", "base URL"),
        ("http://host:4318?x=1", "base URL"),
        ("http://user:secret@host:4318", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_wrong_endpoints_are_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        open_tracing(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("given", ["http://collector:4318", "http://collector:4318/v1/traces/"])
def test_beyond_this_machine_an_open_line_is_told(given: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "leanserve.launch"):
        tracing = open_tracing(given)
    assert tracing is not None
    tracing.close()
    assert "spans go to collector unencrypted" in caplog.text
    assert "spans go to http://collector:4318/v1/traces" in caplog.text
