"""`leanserve loadtest` as a user types it, against the mock server."""

import asyncio
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from leanserve.__main__ import app
from leanserve.contracts.errors import LeanServeError
from leanserve.loadtest.arrivals import ClosedLoop
from leanserve.loadtest.client_load import ClientLoad
from leanserve.loadtest.correctness import Correctness
from leanserve.loadtest.guard import warnings_of
from leanserve.loadtest.lengths import Lengths
from leanserve.loadtest.measures import measure
from leanserve.loadtest.progress import Display
from leanserve.loadtest.record import Record
from leanserve.loadtest.session import Finished, LoadTest, run_test
from leanserve.loadtest.slo import Slo
from leanserve.loadtest.workload import WorkloadOptions
from loadtest.known_server import known_server


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str
    """With the message of an expected error, which `main` prints."""


def loadtest(*arguments: str, columns: int = 100) -> Done:
    """The command in this process: starting one costs more than most tests here."""
    result = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb"}).invoke(app, ["loadtest", *arguments])
    if result.exception is not None and not isinstance(result.exception, LeanServeError | SystemExit):
        raise result.exception
    error = str(result.exception) if isinstance(result.exception, LeanServeError) else ""
    return Done(result.exit_code, result.stdout, result.stderr + error)


def summary_in(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


def test_the_basic_forms_write_a_whole_report_and_compare(tmp_path):
    closed = tmp_path / "closed"
    with known_server(tmp_path, ttft_ms=20, gap_ms=3, prefill_ms_per_1k=2, drift=4) as server:
        done = loadtest(
            *(server.url, "--requests", "40", "--concurrency", "4", "--prompt-tokens", "512", "--output-tokens", "32"),
            *("--seed", "1", "--out", str(closed)),
        )
        assert done.returncode == 0, done.stderr
        again = loadtest(server.url, "--requests", "8", "--rate", "20", "--arrival", "poisson", "--repeat", "0")
        assert again.returncode == 0, again.stderr
    summary = summary_in(closed)
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        assert summary[name].keys() >= {"mean", "p50", "p90", "p95", "p99", "max"}
        assert summary[name]["max"] > 0
    assert (summary["requests"], summary["errors"]) == (40, 0)
    assert (summary["input_tokens"], summary["output_tokens"]) == (40 * 512, 40 * 32)
    assert summary["goodput_rps"] == pytest.approx(40 / summary["duration_s"])
    assert summary["settings"]["concurrency"] == 4
    assert "api_key" not in summary["settings"]
    # The mock answers differently in company: the repeated answers say so, and where.
    correctness = summary["correctness"]
    assert correctness["repeated"] == 4
    assert len(correctness["different"]) >= 3
    assert {(one["first"], one["unit"]) for one in correctness["different"]} == {(4, "token")}
    assert "differs from token 4" in done.stdout.replace("\n", " ")

    records = [json.loads(line) for line in (closed / "requests.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(40))
    assert all(len(record["chunk_ms"]) == 32 for record in records)

    page = (closed / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)[^)]*\)|@import|<script', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "two plots share an id"
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert used <= set(ids)
    assert {path.name for path in closed.glob("*.png")} >= {"timeline.png", "ttft.png", "decode.png", "latencies.png"}

    assert "poisson, 20 requests/s" in again.stdout.replace("\n", " ")
    slower = tmp_path / "slower.json"
    changed = {"ttft_ms": summary["ttft_ms"] | {"p50": 2 * summary["ttft_ms"]["p50"]}}
    changed["settings"] = summary["settings"] | {"rate": 20.0}
    slower.write_text(json.dumps(summary | changed))
    compared = loadtest("compare", str(closed), str(slower))
    assert compared.returncode == 0, compared.stderr
    assert re.search(r"ttft p50 .* \+100\.0%", compared.stdout)
    assert re.search(r"ttft p99 .* \+0\.0%", compared.stdout)
    assert "settings differ: rate is None in A and 20.0 in B" in compared.stdout
    assert "no summary of a load test" in loadtest("compare", str(closed), str(_not_a_summary(tmp_path))).stderr


def _not_a_summary(tmp_path: Path) -> Path:
    path = tmp_path / "other.json"
    path.write_text('{"ttft_ms": {}}')
    return path


def test_a_trace_is_run_whole_and_by_itself(tmp_path):
    trace = tmp_path / "trace.jsonl"
    line = {"prompt_tokens": 30, "output_tokens": 2}
    trace.write_text("".join(json.dumps({"timestamp_s": at * 0.01, **line}) + "\n" for at in range(50)))
    with known_server(tmp_path, ttft_ms=5, gap_ms=1) as server:
        done = loadtest(server.url, "--trace", str(trace), "--repeat", "0", "--out", str(tmp_path / "out"))
        assert done.returncode == 0, done.stderr
        assert "trace trace.jsonl" in done.stdout
        part = loadtest(server.url, "--trace", str(trace), "--repeat", "0", "--requests", "3")
        assert "3 of 3" in part.stdout
    found = summary_in(tmp_path / "out")
    assert (found["requests"], found["input_tokens"], found["output_tokens"]) == (50, 1500, 100)
    assert found["duration_s"] >= 0.49
    refused = loadtest("http://127.0.0.1:9", "--trace", str(trace), "--rate", "3", "--needles", "0.5")
    assert "leave out --rate, --needles" in refused.stderr


def test_a_sweep_finds_the_highest_load_within_the_slo(tmp_path):
    out = tmp_path / "out"
    with known_server(tmp_path, ttft_ms=30, gap_ms=2) as server:
        done = loadtest(
            *(server.url, "--sweep", "concurrency=8,2,4", "--slo", "ttft=60s,e2e=60s", "--requests", "8"),
            *("--output-tokens", "4", "--repeat", "0", "--out", str(out)),
        )
    assert done.returncode == 0, done.stderr
    sweep = summary_in(out)["sweep"]
    assert [step["load"] for step in sweep["steps"]] == [2, 4, 8]
    assert all(step["measures"]["requests_per_s"] > 0 for step in sweep["steps"])
    assert sweep["best"] == 8
    assert "highest concurrency that meets the SLO: 8" in done.stdout
    assert (out / "sweep.png").exists()


def test_what_cannot_work_is_one_line_with_the_numbers(tmp_path):
    refusals = {
        ("--prompt-tokens", "100k"): r"102,400 prompt \+ 64 output = 102,464 tokens, and the server's limit is 100,000",
        ("--rate", "2", "--concurrency", "2"): "give one of them",
        ("--slo", "ttft=2"): "'ttft=2' is not one of",
        ("--sweep", "speed=1"): "rate=1,2,4",
        ("--extra-body", "[1]"): "must be a JSON object",
        ("--endpoint", "chat", "--model", "m", "--prompt-tokens", "20"): "20 tokens cannot be written",
    }
    with known_server(tmp_path) as server:
        for arguments, message in refusals.items():
            done = loadtest(server.url, *arguments)
            assert done.returncode == 1, (arguments, done.stdout)
            assert re.search(message, done.stderr), done.stderr
    for url, message in {
        "http://127.0.0.1:9": "no server at http://127.0.0.1:9: Connection refused; start one",
        "ftp://x": "is not the URL of a server",
    }.items():
        done = loadtest(url)
        assert done.returncode == 1
        assert message in done.stderr


def finish(test: LoadTest) -> Finished:
    return asyncio.run(run_test(test, Display(Console(file=io.StringIO()))))


def test_servers_that_refuse_extra_fields_and_speak_chat_are_served_too(tmp_path):
    workload = WorkloadOptions(
        requests=4, prompts="text", prompt_tokens=Lengths("200"), output_tokens=Lengths("6"), needle_share=0.5
    )
    refuse = ["return_token_ids", "cache_salt", "ignore_eos"]
    with known_server(tmp_path, ttft_ms=5, gap_ms=1, refuse=refuse) as server:
        finished = finish(LoadTest(url=f"{server.url}/v1/", endpoint="chat", workload=workload))
    measures, correctness = finished.report.measures, finished.report.correctness
    assert (measures.succeeded, measures.output_tokens) == (4, 24)
    assert (correctness.repeated, correctness.equal) == (4, 4)
    # The mock knows no facts.
    assert (correctness.needles_asked, correctness.needles_found, correctness.needles_missed) == (2, 0, [1, 3])
    # It counts words, not the bundled tokenizer's tokens: the report says so and uses the server's count.
    assert measures.length_mismatches == 4
    assert any("another length by the server's count" in warning for warning in finished.report.warnings)


@pytest.mark.parametrize("load", [("--concurrency", "2"), ("--rate", "100")])
def test_turns_without_token_ids_end_with_advice(load, tmp_path):
    with known_server(tmp_path, ttft_ms=1, gap_ms=1, refuse=["return_token_ids"]) as server:
        done = loadtest(server.url, "--turns", "2", "--requests", "4", "--output-tokens", "2", *load)
    assert done.returncode == 1
    assert done.stderr.endswith("this server sends none; add --prompts text")


def test_turns_go_on_from_the_answers(tmp_path):
    workload = WorkloadOptions(
        requests=6, turns=3, prompt_tokens=Lengths("100"), turn_tokens=Lengths("10"), output_tokens=Lengths("5")
    )
    with known_server(tmp_path, ttft_ms=5, gap_ms=1) as server:
        finished = finish(LoadTest(url=server.url, workload=workload, arrivals=ClosedLoop(2)))
    assert [record.prompt_tokens for record in finished.records] == [100, 115, 130] * 2
    assert [record.turn for record in finished.records] == [0, 1, 2] * 2
    assert finished.report.measures.length_mismatches == 0


def test_a_run_that_is_not_to_be_trusted_says_why():
    records = [
        Record(
            index=0,
            request_id="",
            conversation=0,
            turn=0,
            outcome="ok",
            intended_s=0,
            client_delay_ms=0,
            prompt_tokens_asked=10,
            output_tokens_asked=5,
            chunk_ms=[10, 30],
            chunk_tokens=[1, 1],
            ttft_ms=10,
            last_token_ms=30,
            e2e_ms=30,
            output_tokens=2,
            cached_tokens=8,
        )
    ]
    quiet, busy = ClientLoad(lag_ms=[0.1] * 99, cpu_share=0.1), ClientLoad(lag_ms=[12.0] * 99, cpu_share=0.93)
    measures = measure(records, Slo())

    def warnings(client: ClientLoad, *, shares_prompts: bool = True) -> str:
        found = warnings_of(measures, client, None, Correctness(), shares_prompts=shares_prompts, interrupted=False)
        return "\n".join(found)

    assert "bottleneck" not in warnings(quiet)
    assert "lags by 12.0 ms" in warnings(busy)
    assert "93% of a core" in warnings(busy)
    assert "1 answers are shorter" in warnings(quiet)
    assert "1 answers came without usage" in warnings(quiet)
    assert "8 of 10 prompt tokens came from the server's prefix cache" in warnings(quiet, shares_prompts=False)
    assert "prefix cache" not in warnings(quiet)


def test_every_option_that_a_readme_names_exists():
    root = Path(__file__).parents[2]
    text = "".join((root / path).read_text() for path in ("README.md", "leanserve/loadtest/README.md"))
    lines = re.findall(r"^leanserve loadtest (.*)$", text, re.MULTILINE)
    assert len(lines) >= 6
    offered = {name: loadtest(*name, "--help", columns=200).stdout for name in ((), ("compare",), ("scaling",))}
    for line in lines:
        words = line.split()
        command = (words[0],) if (words[0],) in offered else ()
        options = {word for word in words if word.startswith("--")}
        assert options <= set(re.findall(r"--[a-z-]+", offered[command])), line


@pytest.mark.parametrize("arguments", [("--help",), ("compare", "--help"), ("scaling", "--help")], ids=" ".join)
def test_help_fits_a_screen_per_group(arguments):
    done = loadtest(*arguments, columns=80)
    assert done.returncode == 0
    groups = re.findall(r"^╭.*?^╰", done.stdout, re.MULTILINE | re.DOTALL)
    assert groups
    assert max(group.count("\n") for group in groups) < 24
