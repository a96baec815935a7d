"""One OpenTelemetry span for each HTTP request, and one below it for each thing it waited for: counts, names and times,
never a prompt or an answer.

Names are those of OpenTelemetry's conventions for HTTP servers (opentelemetry.io/docs/specs/semconv/http) and for
generative AI (github.com/open-telemetry/semantic-conventions-genai); `leanserve.` stands before what has no name there.
A request's spans are made when it has ended, out of times that were noted anyway: tokens pay nothing for them. Only
this module knows OpenTelemetry, which is an extra: it is imported where somebody wants spans.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from leanserve import __version__
from leanserve.server.answer import Answer
from leanserve.server.logs import printable
from leanserve.server.request_facts import PROBE_PATHS, RequestFacts
from leanserve.server.statistics import RequestTimes

__all__ = ["Tracing"]

_UNTRACED = PROBE_PATHS | {"/metrics"}
_MAX_CHOICES_SHOWN = 16
"""A request may have thousands; so many have spans of their own."""
_CLOSE_S = 5.0
"""At the end, for spans to reach a collector that may be gone."""
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})

_Attributes = dict[str, str | int | float | bool | list[str]]


class Tracing:
    """Makes spans, and sends them in batches from a thread of its own. Beyond a bounded queue they are dropped.

    The SDK's own variables say which requests are traced (OTEL_TRACES_SAMPLER; by default as the client's traceparent
    wishes, and all without one), what the service is called (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) and how long
    batches and the queue may be (OTEL_BSP_...).

    Args:
        exporter: what takes the batches.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        own = Resource({"service.name": "leanserve", "service.version": __version__})
        resource = Resource.create().merge(own).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("leanserve", __version__)
        self._parents = TraceContextTextMapPropagator()

    def record(self, scope: Scope, facts: RequestFacts, status: int) -> None:
        """A request has ended, however it ended.

        Args:
            status: as it was answered; 499: the client left before there was one.
        """
        if scope["path"] in _UNTRACED:
            return
        clock = _Clock()
        method: str = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        route: str | None = getattr(scope.get("route"), "path", None)
        shown_method = "HTTP" if method == "_OTHER" else method
        attributes = _http_attributes(scope, facts, method, route, status)
        if facts.answer is not None:
            attributes |= _generation_attributes(facts.answer, facts)
        span = self._tracer.start_span(
            shown_method if route is None else f"{shown_method} {route}",
            context=self._parent(scope),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=clock.ns(facts.arrived_at),
        )
        if span.is_recording():
            # A client's own fault is no error of ours, by HTTP's conventions; a client that left is one.
            if status >= 500 or facts.left_in is not None or (status < 400 and facts.failure is not None):
                span.set_status(Status(StatusCode.ERROR, facts.failure))
            if facts.times:
                self._record_phases(span, list(facts.times.values()), clock)
        span.end(clock.now_ns)

    def close(self) -> None:
        """Send what is left, for a few seconds at most. Blocks."""
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(_CLOSE_S)

    def _parent(self, scope: Scope) -> Context:
        """The client's span, where its headers name one. More than one traceparent is none (W3C Trace Context, 3.2)."""
        headers = Headers(scope=scope)
        traceparent = headers.getlist("traceparent")
        carrier: dict[str, str] = {}
        if len(traceparent) == 1:
            carrier = {"traceparent": traceparent[0], "tracestate": ",".join(headers.getlist("tracestate"))}
        return self._parents.extract(carrier, context=Context())

    def _record_phases(self, span: Span, choices: list[RequestTimes], clock: "_Clock") -> None:
        below = set_span_in_context(span, Context())
        for lost_at in sorted({at for times in choices for at in times.engine_lost_at}):
            span.add_event("leanserve.engine_lost", timestamp=clock.ns(lost_at))
        first = choices[0]
        self._record_phase(_Phase("prepare", first.arrived_at, first.submitted_at), {}, below, clock)
        for index, times in enumerate(choices[:_MAX_CHOICES_SHOWN]):
            number = {"leanserve.choice.index": index} if len(choices) > 1 else {}
            for resumed_at in times.resumed_at:
                span.add_event("leanserve.resumed", number, clock.ns(resumed_at))
            for phase in _phases(times, clock.now):
                self._record_phase(phase, number, below, clock)

    def _record_phase(self, phase: "_Phase", number: Mapping[str, int], below: Context, clock: "_Clock") -> None:
        attributes = {**number, **phase.counts}
        span = self._tracer.start_span(phase.name, below, attributes=attributes, start_time=clock.ns(phase.began_at))
        span.end(clock.ns(phase.ended_at))


class _Clock:
    """Times of `time.perf_counter` as nanoseconds since 1970, by both clocks' reading now."""

    def __init__(self) -> None:
        self.now = time.perf_counter()
        self.now_ns = time.time_ns()

    def ns(self, at: float) -> int:
        return self.now_ns - round((self.now - at) * 1e9)


@dataclass(frozen=True, slots=True)
class _Phase:
    name: str
    began_at: float
    ended_at: float
    counts: Mapping[str, int] = field(default_factory=dict[str, int])


def _phases(times: RequestTimes, now: float) -> Iterator[_Phase]:
    """What a choice went through; the last phase may have been cut off."""
    if times.scheduled_at is None:
        yield _Phase("queue", times.submitted_at, now)
        return
    # The step that took it in may have begun before it came.
    scheduled_at = max(times.scheduled_at, times.submitted_at)
    yield _Phase("queue", times.submitted_at, scheduled_at)
    first_token_at = now if times.first_token_at is None else times.first_token_at
    yield _Phase("prefill", scheduled_at, first_token_at, {"leanserve.prompt_tokens": times.prompt_tokens})
    if times.first_token_at is not None:
        decoded = {"leanserve.output_tokens": times.output_tokens}
        yield _Phase("decode", first_token_at, times.last_token_at, decoded)


def _http_attributes(scope: Scope, facts: RequestFacts, method: str, route: str | None, status: int) -> _Attributes:
    attributes: _Attributes = {
        "http.request.method": method,
        "url.scheme": scope["scheme"],
        "url.path": printable(scope["path"]),
        "leanserve.request_id": facts.request_id,
    }
    if route is not None:
        attributes["http.route"] = route
    if scope.get("client"):
        attributes["client.address"] = scope["client"][0]
    if status != 499:
        attributes["http.response.status_code"] = status
    if facts.left_in is not None:
        attributes["error.type"] = "client_disconnected"
        attributes["leanserve.disconnect.phase"] = facts.left_in
    elif status >= 400 or facts.error_code is not None:
        attributes["error.type"] = facts.error_code or str(status)
    return attributes


def _generation_attributes(answer: Answer, facts: RequestFacts) -> _Attributes:
    choices = list(answer.choices.values())
    sampling = choices[0].sampling
    samples = len(choices) // len({id(choice.prompt) for choice in choices})
    attributes: _Attributes = {
        "gen_ai.operation.name": answer.operation,
        "gen_ai.provider.name": "leanserve",
        "gen_ai.request.model": answer.model_name,
        "gen_ai.request.stream": answer.streams,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p),
        "gen_ai.request.frequency_penalty": float(sampling.frequency_penalty),
        "gen_ai.request.presence_penalty": float(sampling.presence_penalty),
        "gen_ai.response.model": answer.model_name,
        "gen_ai.response.id": answer.id,
        "gen_ai.response.finish_reasons": [c.finish_reason for c in choices if c.finish_reason is not None],
        "gen_ai.usage.input_tokens": answer.prompt_tokens,
        "gen_ai.usage.output_tokens": answer.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": answer.cached_tokens,
    }
    if sampling.top_k is not None:
        attributes["gen_ai.request.top_k"] = float(sampling.top_k)
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    if samples > 1:
        attributes["gen_ai.request.choice.count"] = samples
    first_tokens = [times.first_token_at for times in facts.times.values() if times.first_token_at is not None]
    if answer.streams and first_tokens:
        attributes["gen_ai.response.time_to_first_chunk"] = min(first_tokens) - facts.arrived_at
    if any(times.engine_lost_at for times in facts.times.values()):
        attributes["leanserve.engine_restarts"] = max(len(times.engine_lost_at) for times in facts.times.values())
    return attributes
