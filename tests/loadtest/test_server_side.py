"""What servers tell of themselves, in their own names, and what it adds up to."""

import asyncio
import tracemalloc

import pytest

from leanserve.loadtest.http_stream import Address
from leanserve.loadtest.measures import Distribution, Measures, measure
from leanserve.loadtest.scaling import SPEEDS, ScalingResult, speed_up, write_scaling
from leanserve.loadtest.scrape import Sample, Scraper, ServerSamples, read_health, read_metrics
from leanserve.loadtest.server_view import view_server
from leanserve.loadtest.slo import Slo
from leanserve.loadtest.sweep import sweep_of

LEANSERVE = """\
# HELP leanserve:num_requests_running Requests that run.
# TYPE leanserve:num_requests_running gauge
leanserve:num_requests_running{engine="0",model_name="a \\"quoted\\" name"} 3.0
leanserve:num_requests_waiting{engine="0",model_name="m"} 1.0
leanserve:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
leanserve:kv_cache_pages{engine="0",model_name="m",rank="0"} 2048.0
leanserve:kv_cache_pages_used{engine="0",model_name="m",rank="0"} 30.0
leanserve:kv_cache_pages_used{engine="0",model_name="m",rank="1"} 10.0
leanserve:num_preemptions_total{engine="0",model_name="m"} 2.0
leanserve:prefix_cache_queries_total{engine="0",model_name="m"} 1e3
leanserve:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 7.0
"""
VLLM = """\
vllm:num_requests_running{engine="0"} 2
vllm:num_requests_running{engine="1"} 3
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.25
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            LEANSERVE,
            Sample(
                at_s=1,
                running=3,
                waiting=1,
                kv_use=0.25,
                kv_per_rank={"0": 30, "1": 10},
                preemptions=2,
                cache_queries=1000,
            ),
        ),
        # two engines of vLLM behind one page
        (
            VLLM,
            Sample(at_s=1, running=5, kv_use=0.5),
        ),
        (
            "sglang:num_running_reqs 4\nsglang:num_queue_reqs 6\nsglang:token_usage 0.1\n",
            Sample(at_s=1, running=4, waiting=6, kv_use=0.1),
        ),
        ("llamacpp:requests_processing 1\nllamacpp:kv_cache_usage_ratio 0.5\n", Sample(at_s=1, running=1, kv_use=0.5)),
        ("tgi_batch_current_size 2\ntgi_queue_size 1 1700000000\n", Sample(at_s=1, running=2, waiting=1)),
        ("process_cpu_seconds_total 3\nbroken line\nvllm:num_requests_running x\n", Sample(at_s=1)),
    ],
    ids=["leanserve", "vllm", "sglang", "llama.cpp", "tgi", "other"],
)
def test_metrics_are_found_by_the_ends_of_their_names(text, expected):
    assert read_metrics(text, 1) == expected


def test_health_tells_pages_where_there_are_no_metrics():
    content = b'{"status": "ok", "running": 1, "waiting": 0, "pages_used_per_rank": [4, 5]}'
    assert read_health(content, 2) == Sample(at_s=2, running=1, waiting=0, kv_per_rank={"0": 4, "1": 5})
    assert read_health(b'{"status": "ok"}', 2) is None
    assert read_health(b"", 2) is None


def test_a_page_is_let_go_once_it_is_read():
    page = "\n".join([f'leanserve:unused{{le="{n}"}} 1' for n in range(4000)]) + f"\n{LEANSERVE}"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(page)}\r\n\r\n{page}".encode())
        await writer.drain()
        writer.close()

    async def kept_bytes() -> int:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            scraper = Scraper(Address.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
            await scraper.sample()
            tracemalloc.start()
            try:
                for _ in range(20):
                    await scraper.sample()
                kept, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        seen = scraper.samples(origin_ns=0)
        assert (seen.source, len(seen.samples)) == ("/metrics", 21)
        assert seen.samples[-1].kv_per_rank == {"0": 30, "1": 10}
        assert seen.samples[0].at_s < seen.samples[-1].at_s
        return kept

    assert asyncio.run(kept_bytes()) < 5 * len(page)


def test_a_run_is_summed_up_from_its_samples():
    samples = [
        Sample(at_s=-1, running=0, preemptions=5, cache_queries=100),
        Sample(at_s=0, running=4, waiting=2, kv_use=0.2, kv_per_rank={"0": 30, "1": 10}, preemptions=6),
        Sample(at_s=1, running=2, waiting=9, kv_use=0.1, kv_per_rank={"0": 12, "1": 12}, preemptions=6),
        Sample(at_s=2, running=0, kv_per_rank={"0": 0, "1": 0}, preemptions=8, cache_queries=150),
    ]
    view = view_server(ServerSamples(source="/metrics", samples=samples))
    assert view is not None
    assert (view.peak_running, view.peak_waiting, view.peak_kv_use) == (4, 9, 0.2)
    assert view.peak_kv_per_rank == {"0": 30, "1": 10}
    assert view.imbalance == 1.5
    assert (view.preemptions, view.cache_queries, view.cache_hits) == (3, 50, None)
    assert view.idle_at_end
    assert view_server(ServerSamples()) is None
    left = ServerSamples(source="/metrics", samples=[Sample(at_s=0, running=0, kv_per_rank={"0": 0, "1": 1})])
    view = view_server(left)
    assert view is not None
    assert not view.idle_at_end


def figures(**values: object) -> Measures:
    found = measure([], Slo())
    for name, value in values.items():
        setattr(found, name, value)
    return found


def at(value_ms: float) -> Distribution:
    return Distribution(10, *[value_ms] * 6)


def test_the_knee_has_the_most_tokens_over_latency_and_best_stops_at_the_first_miss():
    measured = [
        (1.0, figures(output_tokens_per_s=100.0, e2e_ms=at(1000), slo_share=1.0)),
        (2.0, figures(output_tokens_per_s=190.0, e2e_ms=at(1100), slo_share=0.95)),
        (4.0, figures(output_tokens_per_s=250.0, e2e_ms=at(2500), slo_share=0.5)),
        (8.0, figures(output_tokens_per_s=250.0, e2e_ms=at(6000), slo_share=1.0)),
    ]
    sweep = sweep_of("rate", measured)
    assert (sweep.knee, sweep.best) == (2, 2)
    assert [step.meets_slo for step in sweep.steps] == [True, True, False, True]
    assert sweep_of("rate", measured[2:]).best is None


def test_speed_up_is_against_the_fewest_ranks(tmp_path):
    by_ranks = {
        1: figures(output_tokens_per_s=50.0, ttft_ms=at(800), tpot_ms=at(20)),
        2: figures(output_tokens_per_s=90.0, ttft_ms=at(420), tpot_ms=at(12)),
        4: figures(output_tokens_per_s=150.0, ttft_ms=at(200), tpot_ms=at(8)),
    }
    result = ScalingResult(model="m", load="", by_ranks=by_ranks, summaries={})
    ups = {name: speed_up(result, speed) for name, speed in SPEEDS.items()}
    assert ups["output tokens/s"] == {1: 1.0, 2: 1.8, 4: 3.0}
    assert ups["prefill (1 / TTFT p50)"][4] == 4.0
    assert ups["decode (1 / TPOT p50)"][4] == 2.5
    write_scaling(result, tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert (tmp_path / "scaling.json").exists()
