"""/metrics: what is counted elsewhere, in the words of Prometheus. Keeps nothing between two scrapes but counters."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from leanserve.contracts.kv_sharding import page_imbalance
from leanserve.server.engine_client import EngineClient
from leanserve.server.statistics import Histogram

__all__ = ["HttpCounts", "Metrics"]

_ENGINE = "0"
"""vLLM numbers its engines, and its dashboards select by the number; here there is one."""


class HttpCounts:
    """What happened to requests as HTTP, since start."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        """By route (its template, never the path itself) and status; 499 is a client that left before an answer."""
        self.disconnects: Counter[str] = Counter()
        """Clients that left before their answer was complete, by the phase their request was in."""
        self.errors: Counter[str] = Counter()
        """By error code, answers and error frames alike."""
        self.unknown_fields = 0
        """Fields of bodies that nobody here has heard of."""
        self.open_streams = 0
        """Answers that are being streamed now."""


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        model_name: the label.
        compatible: also under the names that vLLM's dashboards and gateways ask for.
    """

    def __init__(self, client: EngineClient, http: HttpCounts, model_name: str, *, compatible: bool) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Requests("leanserve", client, model_name))
        self._registry.register(_Own(client, http, model_name))
        if compatible:
            self._registry.register(_Requests("vllm", client, model_name))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The text format, version 0.0.4."""
        return generate_latest(self._registry)


class _Labelled(Collector):
    """Metric families under a prefix, with the labels that all of them have."""

    def __init__(self, prefix: str, client: EngineClient, model_name: str) -> None:
        self._prefix = prefix
        self._client = client
        self._labels = {"model_name": model_name, "engine": _ENGINE}

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return self._gauges(name, text, (), [((), value)])

    def _gauges(
        self, name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
    ) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=[*self._labels, *labels])
        for own, value in values:
            family.add_metric([*self._labels.values(), *own], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return self._counters(name, text, (), [((), value)])

    def _counters(
        self, name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
    ) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=[*self._labels, *labels])
        for own, value in values:
            family.add_metric([*self._labels.values(), *own], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=list(self._labels))
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(list(self._labels.values()), buckets, histogram.sum)
        return family


class _Requests(_Labelled):
    """The names that vLLM gave to what every engine has."""

    def collect(self) -> Iterator[Metric]:
        engine, seen = self._client.engine, self._client.statistics
        load, info = engine.load, engine.info
        yield self._gauge("num_requests_running", "Requests that hold KV pages.", load.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for pages.", load.waiting)
        total_pages = sum(info.pages_per_rank) if info else 0
        used = sum(load.pages_used_per_rank) / total_pages if total_pages else 0.0
        yield self._gauge("kv_cache_usage_perc", "KV pages that live requests hold; 1 is all.", used)
        if info is not None:
            config = {
                "block_size": str(info.page_tokens),
                "num_gpu_blocks": str(total_pages),
                "enable_prefix_caching": str(info.prefix_cache),
                "cache_dtype": info.dtype,
            }
            labels = tuple(config)
            yield self._gauges(
                "cache_config_info", "Facts about the KV cache.", labels, [(tuple(config.values()), 1.0)]
            )
        yield self._counter("num_preemptions", "Requests sent away to be computed again.", load.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens of requests that got a first token.", seen.prompt_tokens)
        yield self._counter("prompt_tokens_cached", "Those of them that were not computed.", seen.cached_prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", seen.generation_tokens)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", load.prefix_queried_tokens
        )
        yield self._counter("prefix_cache_hits", "Prompt tokens found there.", load.prefix_hit_tokens)
        yield self._counters(
            "request_success",
            "Requests that ended, by finish reason.",
            ("finished_reason",),
            [((reason,), seen.finished[reason]) for reason in ("stop", "length", "abort", "error")],
        )
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", seen.time_to_first_token_s),
            ("inter_token_latency_seconds", "Between two tokens of a request.", seen.inter_token_s),
            (
                "request_time_per_output_token_seconds",
                "Mean time between two tokens, by request.",
                seen.per_output_token_s,
            ),
            ("e2e_request_latency_seconds", "From arrival to the last token.", seen.end_to_end_s),
            ("request_queue_time_seconds", "From arrival to the first step.", seen.queue_s),
            ("request_prefill_time_seconds", "From the first step to the first token.", seen.prefill_s),
            ("request_decode_time_seconds", "From the first token to the last.", seen.decode_s),
            ("request_inference_time_seconds", "From the first step to the last token.", seen.inference_s),
            ("request_prompt_tokens", "Tokens of a prompt.", seen.request_prompt_tokens),
            ("request_generation_tokens", "Tokens generated for a request.", seen.request_generation_tokens),
        ):
            yield self._histogram(name, text, histogram)


class _Own(_Labelled):
    """What no other engine has, or says."""

    def __init__(self, client: EngineClient, http: HttpCounts, model_name: str) -> None:
        super().__init__("leanserve", client, model_name)
        self._http = http

    def collect(self) -> Iterator[Metric]:
        engine, http = self._client.engine, self._http
        load, info = engine.load, engine.info
        pages = info.pages_per_rank if info else ()
        used = load.pages_used_per_rank or (0,) * len(pages)
        yield self._gauges("kv_cache_pages_used", "KV pages that live requests hold.", ("rank",), _by_rank(used))
        yield self._gauges("kv_cache_pages", "KV pages there are.", ("rank",), _by_rank(pages))
        yield self._gauges(
            "kv_cache_pages_cached",
            "KV pages that only the prefix cache keeps.",
            ("rank",),
            _by_rank(load.pages_cached_per_rank),
        )
        seen = self._client.statistics
        yield self._histogram("step_seconds", "One step of the engine, on rank 0.", seen.step_s)
        yield self._counters(
            "step_part_seconds",
            "Time of all steps by what it went to; combine (waiting for other ranks) is in forward and sample; where "
            "steps overlap, schedule passes beside them.",
            ("part",),
            [((part,), took_s) for part, took_s in seen.step_part_s.items()],
        )
        yield self._counters(
            "step_tokens",
            "Tokens computed, by what they were.",
            ("kind",),
            [(("prefill",), seen.step_prefill_tokens), (("decode",), seen.step_decode_tokens)],
        )
        yield self._gauge(
            "kv_cache_imbalance", "Pages used on the fullest rank over the mean; 1 is even.", page_imbalance(used)
        )
        yield self._counter("steps", "Steps the engine has completed.", load.step)
        # The first engine of a server that loads has not come yet.
        restarts = max(engine.attempt - 1, 0)
        yield self._counter("engine_restarts", "Engines that took a failed one's place.", restarts)
        now = time.monotonic()
        pulses = [(str(rank), heard) for rank, heard in sorted(self._client.health.ranks.items())]
        for name, text, values in (
            (
                "rank_pulse_age_seconds",
                "Since a rank last said that it lives; twice a second is usual.",
                [((rank,), now - heard.heard_at) for rank, heard in pulses],
            ),
            ("rank_step", "A rank's newest complete step.", [((rank,), heard.pulse.step) for rank, heard in pulses]),
            (
                "rank_busy_seconds",
                "How long a rank's current step has taken.",
                [((rank,), heard.pulse.busy_s) for rank, heard in pulses],
            ),
        ):
            yield self._gauges(name, text, ("rank",), values)
        yield self._gauge("engine_silent_seconds", "How long the engine has owed tokens.", self._client.silent_s)
        yield self._counters(
            "http_responses",
            "Answers, by route and status.",
            ("route", "status"),
            [((route, str(status)), count) for (route, status), count in sorted(http.responses.items())],
        )
        yield self._counters(
            "request_errors",
            "Errors told to clients, by code.",
            ("code",),
            [((code,), count) for code, count in sorted(http.errors.items())],
        )
        yield self._counters(
            "client_disconnects",
            "Clients that left before their answer was complete, by phase.",
            ("phase",),
            [((phase,), http.disconnects[phase]) for phase in ("body", "queued", "prefill", "decode")],
        )
        yield self._counter("unknown_request_fields", "Fields that were accepted and ignored.", http.unknown_fields)


def _by_rank(values: Iterable[int]) -> list[tuple[tuple[str, ...], float]]:
    return [((str(rank),), value) for rank, value in enumerate(values)]
