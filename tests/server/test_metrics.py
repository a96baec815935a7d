"""/metrics says what happened, under the names that dashboards know."""

import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from leanserve.contracts.messages import Pulse
from leanserve.server.statistics import Histogram, RequestStatistics
from server.front_end import Live, live_server, run
from server.test_http import posted, sent

NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
}


async def scrape(live: Live) -> dict[tuple[str, str], float]:
    """Samples by name and by the labels that are not the same everywhere."""
    response = await live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if ":" in sample.name:
                assert (labels.pop("model_name"), labels.pop("engine")) == ("echo", "0")
            found[sample.name, ",".join(f"{k}={v}" for k, v in labels.items())] = sample.value
    return found


def test_names_are_the_known_ones_and_vllms_on_request() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            names = {name for name, _ in await scrape(live)}
            assert {f"leanserve:{name}" for name in NAMES} <= names
            assert not [name for name in names if name.startswith("vllm:")]
            assert "process_resident_memory_bytes" in names
        async with live_server(None, settings={"metrics_compat": True}) as live:
            names = {name for name, _ in await scrape(live)}
            assert {f"{prefix}:{name}" for name in NAMES for prefix in ("leanserve", "vllm")} <= names

    run(scenario())


def test_what_is_counted_is_what_happened() -> None:
    async def scenario() -> None:
        async with live_server(None, step_s=0.002) as live:
            await live.complete(prompt=[[5, 6, 11, 12]] * 3, max_tokens=4)
            await live.complete(prompt=[5, 2], max_tokens=9)
            await live.complete(prompt=[live.engine.error_token], max_tokens=9)
            await live.complete(prompt=[5], temperature=7)
            await live.complete(prompt=[5], frobnicate=1)
            await live.http.get("/nowhere/secret")
            async with sent(live, posted({"prompt": [5], "max_tokens": 4000, "stream": True})) as (reader, _):
                await reader.readuntil(b"data: ")
            await live.quiet()
            seen = await scrape(live)

            def of(name: str, labels: str = "") -> float:
                return seen["leanserve:" + name, labels]

            assert of("prompt_tokens_total") == 3 * 4 + 2 + 1 + 1 + 1
            assert of("prompt_tokens_cached_total") == 3 * 2 + 1
            assert of("request_success_total", "finished_reason=length") == 4
            assert of("request_success_total", "finished_reason=stop") == 1
            assert of("request_success_total", "finished_reason=error") == 1
            assert of("request_success_total", "finished_reason=abort") == 1
            assert of("client_disconnects_total", "phase=decode") == 1
            assert of("request_errors_total", "code=invalid_value") == 1
            assert of("request_errors_total", "code=engine_unavailable") == 1
            assert of("http_responses_total", "route=none,status=404") == 1
            assert of("http_responses_total", "route=/v1/completions,status=400") == 1
            assert of("unknown_request_fields_total") == 1
            assert of("generation_tokens_total") >= 3 * 4 + 2 + 2 + 16 + 1
            assert of("time_to_first_token_seconds_count") == of("request_queue_time_seconds_count") == 7
            assert of("request_generation_tokens_count") == of("e2e_request_latency_seconds_count") == 7
            assert of("request_prompt_tokens_bucket", "le=2.0") == 4
            assert of("kv_cache_pages", "rank=0") == 64

    run(scenario())


def test_ranks_are_told_apart() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            assert (await scrape(live))["leanserve:kv_cache_pages_used", "rank=0"] == 0
            now = time.monotonic()
            for rank in range(2):
                pulse = Pulse(rank=rank, pid=1, host="here", step=40 + rank, busy_s=0.25 * rank)
                live.client.health.hear(pulse, now - 7 * rank)
            seen = await scrape(live)
            assert [seen["leanserve:rank_step", f"rank={rank}"] for rank in range(2)] == [40, 41]
            assert seen["leanserve:rank_busy_seconds", "rank=1"] == 0.25
            ages_s = [seen["leanserve:rank_pulse_age_seconds", f"rank={rank}"] for rank in range(2)]
            assert ages_s[0] >= 0
            assert ages_s[1] - ages_s[0] == pytest.approx(7, abs=1)
            assert seen["leanserve:engine_restarts_total", ""] == 0

    run(scenario())


def test_a_stop_string_counts_as_a_stop() -> None:
    from leanserve.server.tokenizer import Tokenizer
    from server.small_tokenizers import byte_level

    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level()), pause_at_tokens=50) as live:
            for stream in (False, True):
                body: dict[str, Any] = {"prompt": "The cat sat", "stop": "cat", "max_tokens": 400, "stream": stream}
                assert (await live.complete(**body)).status_code == 200
            await live.quiet()
            assert live.client.statistics.finished == {"stop": 2}

    run(scenario())


def test_times_add_up() -> None:
    statistics = RequestStatistics()
    statistics.step()
    waiting = statistics.submitted(None, 100)
    began = statistics.step()  # busy with others
    assert waiting.phase == "queued"
    statistics.step()
    statistics.scheduled(waiting)
    assert waiting.phase == "prefill"
    assert waiting.scheduled_at == began
    for _ in range(3):
        now = statistics.step()
        statistics.delivered(waiting, 1, 64, now)
    assert waiting.phase == "decode"
    statistics.ended(waiting, "length")
    parts = statistics.queue_s.sum + statistics.prefill_s.sum + statistics.decode_s.sum
    assert abs(parts - statistics.end_to_end_s.sum) < 1e-9
    assert abs(statistics.queue_s.sum + statistics.inference_s.sum - parts) < 1e-9
    assert sum(statistics.inter_token_s.counts) == 2
    assert abs(statistics.per_output_token_s.sum * 2 - statistics.decode_s.sum) < 1e-9
    assert (statistics.prompt_tokens, statistics.cached_prompt_tokens, statistics.generation_tokens) == (100, 64, 3)


def test_buckets_hold_their_upper_end() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 7.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1, 1]
    assert histogram.sum == 15.0


def test_a_scrape_holds_the_loop_for_less_than_ten_milliseconds() -> None:
    async def scenario() -> None:
        async with live_server(None, settings={"metrics_compat": True}) as live:
            await live.complete(prompt=[5])
            taken: list[float] = []
            for _ in range(20):
                began = time.thread_time()
                live.serving.metrics.text()
                taken.append(time.thread_time() - began)
            assert min(taken) < 0.010

    run(scenario())
