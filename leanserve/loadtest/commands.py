"""The command line of `leanserve loadtest`: a URL tests that server; `compare` and `scaling` are commands.

What is heavy is imported when a test runs.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
import typer
from rich.console import Console
from typer.core import TyperGroup

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.arrivals import ArrivalKind, ClosedLoop, OpenLoop

if TYPE_CHECKING:
    from leanserve.loadtest.session import LoadTest

__all__ = ["loadtest_app"]


class _RunByDefault(TyperGroup):
    """Whatever is no command's name is an argument of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


loadtest_app = typer.Typer(cls=_RunByDefault, no_args_is_help=True, help="Load test an OpenAI-compatible server.")

LOAD, PROMPTS, ARRIVALS, CHECKS = "Load", "Prompts", "Arrivals", "Checks and output"
TRAFFIC, SERVER = "Difficult clients", "Server"

Requests = Annotated[int, typer.Option(min=1, metavar="N", help="How many.", rich_help_panel=LOAD)]
PromptTokens = Annotated[str, typer.Option(metavar="LENGTHS", help="Of each prompt.", rich_help_panel=LOAD)]
OutputTokens = Annotated[str, typer.Option(metavar="LENGTHS", help="Of each answer.", rich_help_panel=LOAD)]
Seed = Annotated[int, typer.Option(metavar="N", help="Equal seeds give equal requests.", rich_help_panel=LOAD)]
TokenIds = Annotated[
    str, typer.Option(metavar="FIRST-LAST", help="Token ids that prompts are made of.", rich_help_panel=PROMPTS)
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        file_okay=False,
        help="For report.html, summary.json, requests.jsonl and PNGs.",
        rich_help_panel=CHECKS,
    ),
]


@loadtest_app.command()
def run(
    url: Annotated[str, typer.Argument(metavar="URL", help="Such as http://127.0.0.1:8000.")],
    requests: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many. Default: 40, or all of --trace.", rich_help_panel=LOAD),
    ] = None,
    prompt_tokens: PromptTokens = "512",
    output_tokens: OutputTokens = "64",
    concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", help="Closed loop: requests at once. Default: 4.", rich_help_panel=LOAD),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(metavar="R", help="Open loop: requests/s, come what may.", rich_help_panel=LOAD),
    ] = None,
    seed: Seed = 1,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="LOADS", help="rate=1,2,4 or concurrency=1,2,4: a run at each.", rich_help_panel=LOAD),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(metavar="LIMITS", help="What goodput keeps: ttft=2s,tpot=50ms,e2e=9s.", rich_help_panel=LOAD),
    ] = None,
    prompts: Annotated[
        Literal["ids", "text"],
        typer.Option(help="text is of exact length for the bundled model.", rich_help_panel=PROMPTS),
    ] = "ids",
    needles: Annotated[
        float, typer.Option(metavar="SHARE", help="Of all: ask for a fact in a document.", rich_help_panel=PROMPTS)
    ] = 0.0,
    shared_prefix_tokens: Annotated[
        str, typer.Option(metavar="N", help="All prompts begin with the same.", rich_help_panel=PROMPTS)
    ] = "0",
    turns: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests of one conversation.", rich_help_panel=PROMPTS)
    ] = 1,
    turn_tokens: Annotated[
        str, typer.Option(metavar="LENGTHS", help="What each later turn adds.", rich_help_panel=PROMPTS)
    ] = "64",
    token_range: TokenIds = "1000-1999",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="JSONL of timestamp_s, prompt_tokens, output_tokens.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    arrival: Annotated[
        ArrivalKind,
        typer.Option(metavar="poisson | constant | gamma | ramp", help="Times of --rate.", rich_help_panel=ARRIVALS),
    ] = "poisson",
    burstiness: Annotated[
        float, typer.Option(metavar="X", help="gamma: variance over Poisson's.", rich_help_panel=ARRIVALS)
    ] = 4.0,
    ramp_to: Annotated[
        float | None, typer.Option(metavar="R", help="ramp: the rate at the end.", rich_help_panel=ARRIVALS)
    ] = None,
    cancel: Annotated[
        float, typer.Option(metavar="SHARE", help="Of all: leave before the end.", rich_help_panel=TRAFFIC)
    ] = 0.0,
    slow_readers: Annotated[
        float, typer.Option(metavar="SHARE", help="Of all: read 2 KiB/s.", rich_help_panel=TRAFFIC)
    ] = 0.0,
    warmup: Annotated[
        int, typer.Option(min=0, metavar="N", help="Requests before it counts.", rich_help_panel=CHECKS)
    ] = 1,
    repeat: Annotated[
        int, typer.Option(min=0, metavar="N", help="Answers to compare with the same alone.", rich_help_panel=CHECKS)
    ] = 4,
    timeout: Annotated[float, typer.Option(metavar="S", help="Of a request.", rich_help_panel=CHECKS)] = 600.0,
    out: Out = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="LEANSERVE_API_KEY", show_envvar=True, rich_help_panel=SERVER),
    ] = None,
    endpoint: Annotated[Literal["completions", "chat"], typer.Option(rich_help_panel=SERVER)] = "completions",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the first listed.", rich_help_panel=SERVER)
    ] = None,
    max_context_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Where the server does not say.", rich_help_panel=SERVER)
    ] = None,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="Merged into every request.", rich_help_panel=SERVER)
    ] = None,
) -> None:
    """Load test an OpenAI-compatible server: latencies, throughput, right answers.

    LENGTHS: 512 | 512-4k | 512,2k,16k | 95%:512,5%:128k | lognormal:2k:0.8
    (median, sigma). Commands of their own: compare A B; scaling --ranks 1,2,4.
    """
    if trace is not None:
        _refuse_beside_trace(
            {
                "--rate": rate is not None,
                "--concurrency": concurrency is not None,
                "--sweep": sweep is not None,
                "--prompts text": prompts == "text",
                "--endpoint chat": endpoint == "chat",
                "--needles": needles > 0,
                "--shared-prefix-tokens": shared_prefix_tokens != "0",
                "--turns": turns > 1,
                "--cancel": cancel > 0,
                "--slow-readers": slow_readers > 0,
            }
        )
    elif requests is None:
        requests = 40
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    del settings["api_key"]
    from leanserve.contracts.token_counts import parse_tokens
    from leanserve.loadtest.lengths import Lengths
    from leanserve.loadtest.prompts import TokenRange
    from leanserve.loadtest.session import LoadTest
    from leanserve.loadtest.slo import Slo
    from leanserve.loadtest.sweep import parse_sweep
    from leanserve.loadtest.workload import WorkloadOptions

    loads = parse_sweep(sweep) if sweep is not None else None
    swept_rate = loads[1][0] if loads is not None and loads[0] == "rate" else None
    test = LoadTest(
        url=url,
        api_key=api_key,
        endpoint=endpoint,
        model=model,
        limit_tokens=parse_tokens(max_context_tokens, "--max-context-tokens") if max_context_tokens else None,
        fields=_fields(extra_body),
        workload=WorkloadOptions(
            requests=1 if requests is None else requests,  # a trace has its own number
            prompt_tokens=Lengths(prompt_tokens),
            output_tokens=Lengths(output_tokens, "--output-tokens"),
            seed=seed,
            prompts="text" if endpoint == "chat" else prompts,
            ids=TokenRange.parse(token_range),
            shared_prefix_tokens=_tokens_or_zero(shared_prefix_tokens, "--shared-prefix-tokens"),
            turns=turns,
            turn_tokens=Lengths(turn_tokens, "--turn-tokens"),
            needle_share=needles,
            cancel_share=cancel,
            slow_share=slow_readers,
        ),
        trace=trace,
        trace_requests=requests,
        arrivals=_arrivals(rate if rate is not None else swept_rate, concurrency, arrival, burstiness, ramp_to),
        sweep=loads,
        slo=Slo.parse(slo) if slo is not None else Slo(),
        warmup=warmup,
        repeat=repeat,
        timeout_s=timeout,
        settings=settings,
    )
    _test_and_report(test, out)


def _test_and_report(test: "LoadTest", out: Path | None) -> None:
    from leanserve.loadtest.progress import Display
    from leanserve.loadtest.session import run_test
    from leanserve.loadtest.tables import print_report

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    display = Display(Console(stderr=True))
    try:
        finished = asyncio.run(run_test(test, display))
    finally:
        display.close()
    print_report(finished.report, Console())
    if out is not None:
        from leanserve.loadtest.output import write_output

        write_output(finished, out)
        Console(stderr=True).print(f"wrote {out / 'report.html'}", highlight=False, soft_wrap=True)
    if finished.report.measures.succeeded == 0:
        raise typer.Exit(1)


@loadtest_app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="A summary.json, or the directory that holds it.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The same of a later run.")],
) -> None:
    """Print two runs side by side, with the change of every figure; settings that differ are named."""
    from leanserve.loadtest.compare import print_comparison
    from leanserve.loadtest.report import read_summary

    print_comparison(read_summary(before), read_summary(after), Console())


@loadtest_app.command()
def scaling(
    ranks: Annotated[str, typer.Option(metavar="N,...", help="Rank counts, each a server of its own.")] = "1,2,4",
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A checkpoint or hub id. Default: the bundled model.")
    ] = None,
    serve: Annotated[
        str, typer.Option(metavar="OPTIONS", help="More for `leanserve serve`, such as '--kv-memory 8GiB'.")
    ] = "",
    requests: Requests = 16,
    prompt_tokens: PromptTokens = "4k",
    output_tokens: OutputTokens = "64",
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at once.", rich_help_panel=LOAD)] = 4,
    token_range: TokenIds = "1000-1999",
    seed: Seed = 1,
    out: Out = None,
) -> None:
    """Start `leanserve serve` at each rank count, run the same load, and show speed-up and efficiency."""
    from leanserve.loadtest.lengths import Lengths
    from leanserve.loadtest.progress import Display
    from leanserve.loadtest.prompts import TokenRange
    from leanserve.loadtest.scaling import ScalingPlan, print_scaling, run_scaling, write_scaling
    from leanserve.loadtest.workload import WorkloadOptions

    counts = [part.strip() for part in ranks.split(",")]
    if not all(count.isdecimal() and int(count) for count in counts):
        raise typer.BadParameter(f"{ranks!r}; give whole numbers of at least 1, such as 1,2,4", param_hint="--ranks")
    plan = ScalingPlan(
        ranks=tuple(sorted({int(count) for count in counts})),
        model=model,
        serve_options=serve,
        workload=WorkloadOptions(
            requests=requests,
            prompt_tokens=Lengths(prompt_tokens),
            output_tokens=Lengths(output_tokens, "--output-tokens"),
            seed=seed,
            ids=TokenRange.parse(token_range),
        ),
        arrivals=ClosedLoop(concurrency),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    display = Display(Console(stderr=True))
    try:
        result = run_scaling(plan, display)
    finally:
        display.close()
    print_scaling(result, Console())
    if out is not None:
        write_scaling(result, out)


def _refuse_beside_trace(given: dict[str, bool]) -> None:
    wrong = [option for option, is_given in given.items() if is_given]
    if wrong:
        raise ConfigError(f"--trace says when requests come and how long they are; leave out {', '.join(wrong)}")


def _tokens_or_zero(text: str, option: str) -> int:
    from leanserve.contracts.token_counts import parse_tokens

    return 0 if text == "0" else parse_tokens(text, option)


def _fields(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"--extra-body is {text!r}; it must be a JSON object such as '{{\"top_p\": 0.9}}'")
    return fields


def _arrivals(
    rate: float | None, concurrency: int | None, arrival: ArrivalKind, burstiness: float, ramp_to: float | None
) -> OpenLoop | ClosedLoop:
    if rate is None:
        if arrival != "poisson" or ramp_to is not None:
            raise ConfigError("--arrival and --ramp-to are of an open loop; add --rate")
        return ClosedLoop(concurrency if concurrency is not None else 4)
    if concurrency is not None:
        raise ConfigError("--rate is an open loop and --concurrency a closed one; give one of them")
    return OpenLoop(rate, arrival, burstiness, ramp_to)
