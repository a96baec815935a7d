"""The command line: serve | generate | demo | loadtest | plan | bench | doctor."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from leanserve import __version__
from leanserve.bench.commands import bench_app
from leanserve.contracts.errors import LeanServeError
from leanserve.launch.configured_command import ConfiguredCommand, use_config_file
from leanserve.loadtest.commands import loadtest_app

__all__ = ["main"]

app = typer.Typer(
    name="leanserve",
    help="Serve very long contexts: a KV cache sharded by position over any number of ranks, GPUs or CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(loadtest_app, name="loadtest")
app.add_typer(bench_app, name="bench")


class DTypeChoice(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DeviceChoice(StrEnum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class CommChoice(StrEnum):
    auto = "auto"
    nccl = "nccl"
    gloo = "gloo"


class AttentionChoice(StrEnum):
    auto = "auto"
    triton = "triton"
    portable = "portable"


class LogLevelChoice(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormatChoice(StrEnum):
    text = "text"
    json = "json"


class MetricsChoice(StrEnum):
    none = "none"
    vllm = "vllm"


class WeightsChoice(StrEnum):
    auto = "auto"
    replicated = "replicated"
    mlp = "mlp"
    all = "all"


MODEL, RANKS, MEMORY, HTTP = "Model", "Ranks and devices", "Memory and batching", "HTTP"
FAILURES, NODES = "Failures and the end", "Several machines"
ACCESS, LIMITS, SIGHT = "Who may ask", "Limits", "What can be seen"

Ranks = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Processes that share the KV cache; auto: every usable GPU, else 1.",
        rich_help_panel=RANKS,
    ),
]
DType = Annotated[
    DTypeChoice,
    typer.Option(
        help="Of weights and KV. auto: float32 on the CPU, the checkpoint's own on a GPU.", rich_help_panel=MODEL
    ),
]
DeviceOption = Annotated[DeviceChoice, typer.Option(help="auto: GPUs where usable.", rich_help_panel=RANKS)]
CommOption = Annotated[
    CommChoice,
    typer.Option(
        help="Collectives. auto: NCCL on GPUs, Gloo on the CPU; gloo lets ranks share a GPU.", rich_help_panel=RANKS
    ),
]
AttentionOption = Annotated[
    AttentionChoice, typer.Option(help="auto: Triton on GPUs, portable elsewhere.", rich_help_panel=RANKS)
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="No CUDA graphs: a faster start and less memory, slower decoding. On the CPU there are none anyway.",
        rich_help_panel=RANKS,
    ),
]
WeightsOption = Annotated[
    WeightsChoice,
    typer.Option(
        help="Split over the ranks: none, MLP and vocabulary, or attention projections too. auto: what costs less.",
        rich_help_panel=RANKS,
    ),
]
PageTokens = Annotated[int, typer.Option(help="Tokens per KV page: 16, 32, 64, 128 or 256.", rich_help_panel=MEMORY)]
MaxContext = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Longest prompt + completion. auto: the model's limit, or what fits.",
        rich_help_panel=MEMORY,
    ),
]
KvMemory = Annotated[
    str,
    typer.Option(
        metavar="SIZE|auto", help="KV memory per rank, such as 512MiB. auto: from what is free.", rich_help_panel=MEMORY
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Requests that begin alike share pages, as do the turns of a chat.",
        rich_help_panel=MEMORY,
    ),
]
MaxBatchTokens = Annotated[
    int, typer.Option(help="Tokens computed in one step, decode and prefill together.", rich_help_panel=MEMORY)
]
MaxSequences = Annotated[int, typer.Option(help="Sequences that run at once.", rich_help_panel=MEMORY)]
LongPrefillTokens = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Longer prompts give way to shorter ones. auto: half of --max-batch-tokens.",
        rich_help_panel=MEMORY,
    ),
]


def _count_or_auto(name: str, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither auto nor a whole number", param_hint=name)
    return int(text)


@app.command(cls=ConfiguredCommand)
def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A checkpoint directory or a hub id. Default: the bundled model."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="YAML with any of these options, such as port: 8001.",
            callback=use_config_file,
            is_eager=True,
            dir_okay=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=HTTP)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.", rich_help_panel=HTTP)
    ] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="The name clients use. Default: as given.", rich_help_panel=HTTP)
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="LEANSERVE_API_KEYS",
            help="A key that lets a client in. Repeatable. Safer in LEANSERVE_API_KEYS or a file.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line.", rich_help_panel=ACCESS)
    ] = None,
    tool_format: Annotated[
        str,
        typer.Option(
            metavar="auto|hermes|llama3|mistral",
            help="How the model writes function calls. auto: as its chat template says.",
            rich_help_panel=HTTP,
        ),
    ] = "auto",
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine without any key.", rich_help_panel=ACCESS),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="A web site whose pages may ask, or *. Repeatable.", rich_help_panel=ACCESS
        ),
    ] = None,
    max_requests_per_key: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Requests of one key in flight. Default: no limit.", rich_help_panel=LIMITS
        ),
    ] = None,
    max_live_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts waiting or running; more get 503.", rich_help_panel=LIMITS)
    ] = 4096,
    max_live_prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens in those prompts together.", rich_help_panel=LIMITS)
    ] = 1 << 26,
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Longest request body.", rich_help_panel=LIMITS)
    ] = "16MiB",
    log_level: Annotated[LogLevelChoice, typer.Option(help="debug tells of every request.", rich_help_panel=SIGHT)] = (
        LogLevelChoice.info
    ),
    log_format: Annotated[
        LogFormatChoice,
        typer.Option(help="json: one object for each event, on stderr, and no banner.", rich_help_panel=SIGHT),
    ] = LogFormatChoice.text,
    access_log: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-", help="A JSON line for each request, without prompts; - is stderr.", rich_help_panel=SIGHT
        ),
    ] = None,
    metrics_compat: Annotated[
        MetricsChoice,
        typer.Option(help="vllm: /metrics has vLLM's names too, for its dashboards.", rich_help_panel=SIGHT),
    ] = MetricsChoice.none,
    ranks: Ranks = "auto",
    device: DeviceOption = DeviceChoice.auto,
    comm: CommOption = CommChoice.auto,
    attention: AttentionOption = AttentionChoice.auto,
    enforce_eager: EnforceEager = False,
    weights: WeightsOption = WeightsChoice.auto,
    dtype: DType = DTypeChoice.auto,
    page_tokens: PageTokens = 64,
    max_context_tokens: MaxContext = "auto",
    kv_memory: KvMemory = "auto",
    prefix_cache: PrefixCache = True,
    max_batch_tokens: MaxBatchTokens = 2048,
    max_sequences: MaxSequences = 256,
    long_prefill_tokens: LongPrefillTokens = "auto",
    step_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="A rank whose step takes longer is taken for dead.", rich_help_panel=FAILURES
        ),
    ] = 120.0,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Of the ranks, within ten minutes; then give up.", rich_help_panel=FAILURES)
    ] = 5,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Requests go on after a restart, in the same stream; or they end with an error.",
            rich_help_panel=FAILURES,
        ),
    ] = True,
    drain_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="Time to finish for live requests after SIGTERM.", rich_help_panel=FAILURES
        ),
    ] = 30.0,
    queue_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Answer 408 to a request that has not begun.", rich_help_panel=LIMITS),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Stop a request that has not ended.", rich_help_panel=LIMITS),
    ] = None,
    nnodes: Annotated[int, typer.Option(help="Machines that take part.", rich_help_panel=NODES)] = 1,
    node_rank: Annotated[
        int, typer.Option(help="This machine among them; 0 has the HTTP port.", rich_help_panel=NODES)
    ] = 0,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="On machine 0, where they meet.", rich_help_panel=NODES)
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API.

    With no MODEL the small bundled one is served: no download, no GPU needed. Under torchrun
    (`torchrun --standalone --nproc-per-node 3 -m leanserve serve ...`) its processes are the ranks.

    Every option can also stand in the environment, --port as LEANSERVE_PORT, or in the file of --config.
    """
    from leanserve.launch.access import AccessOptions
    from leanserve.launch.front_end import ServeOptions, serve_until_stopped
    from leanserve.launch.nodes import Nodes
    from leanserve.launch.options import LaunchOptions, parse_bytes
    from leanserve.launch.under_torchrun import serve_under_torchrun, started_by_torchrun
    from leanserve.server.engine_client import Recovery
    from leanserve.server.logs import open_log
    from leanserve.server.tool_calls import tool_format as find_tool_format

    if started_by_torchrun():
        open_log(log_level.value, log_format.value)
        sys.exit(serve_under_torchrun(sys.argv[1:]))
    options = ServeOptions(
        host=host,
        port=port,
        served_model_name=served_model_name,
        insecure=insecure,
        nodes=Nodes(count=nnodes, rank=node_rank, endpoint=rdzv_endpoint),
        recovery=Recovery(max_restarts=max_restarts, resume=resume),
        drain_timeout_s=drain_timeout,
        queue_timeout_s=queue_timeout,
        request_timeout_s=request_timeout,
        access=AccessOptions(
            keys=tuple(api_key or ()),
            key_file=api_key_file,
            max_requests_per_key=max_requests_per_key,
            cors_origins=tuple(cors_origin or ()),
        ),
        max_live_requests=max_live_requests,
        max_live_prompt_tokens=max_live_prompt_tokens,
        max_body_bytes=parse_bytes(max_body),
        log_level=log_level.value,
        log_format=log_format.value,
        access_log=access_log,
        metrics_compat=metrics_compat is MetricsChoice.vllm,
        tool_format=None if tool_format == "auto" else find_tool_format(tool_format),
        launch=LaunchOptions(
            model=model,
            ranks=_count_or_auto("--ranks", ranks),
            dtype=dtype.value,
            device=device.value,
            comm=comm.value,
            attention=attention.value,
            enforce_eager=enforce_eager,
            weights=weights.value,
            page_tokens=page_tokens,
            kv_memory=None if kv_memory == "auto" else kv_memory,
            max_context_tokens=_count_or_auto("--max-context-tokens", max_context_tokens),
            prefix_cache=prefix_cache,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            long_prefill_tokens=_count_or_auto("--long-prefill-tokens", long_prefill_tokens),
            step_timeout_s=step_timeout,
        ),
    )
    sys.exit(serve_until_stopped(options))


@app.command()
def generate(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PROMPT", help="The prompt, after a model if not the bundled one.")
    ],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; up to 2.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of tokens that reaches this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    ranks: Ranks = "auto",
    device: DeviceOption = DeviceChoice.auto,
    comm: CommOption = CommChoice.auto,
    attention: AttentionOption = AttentionChoice.auto,
    enforce_eager: EnforceEager = False,
    weights: WeightsOption = WeightsChoice.auto,
    dtype: DType = DTypeChoice.auto,
    page_tokens: PageTokens = 64,
    kv_memory: KvMemory = "auto",
) -> None:
    """Print one completion as it is generated, then its speed. A prompt of - is read from standard input."""
    from leanserve.contracts.sampling import SamplingParams
    from leanserve.llm import LLM, print_completion

    if len(arguments) > 2:
        raise typer.BadParameter(f"expected [MODEL] PROMPT, got {len(arguments)} words; quote the prompt")
    prompt = sys.stdin.read() if arguments[-1] == "-" else arguments[-1]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with LLM(
        arguments[0] if len(arguments) == 2 else None,
        ranks=_count_or_auto("--ranks", ranks),
        device=device.value,
        comm=comm.value,
        attention=attention.value,
        enforce_eager=enforce_eager,
        weights=weights.value,
        dtype=dtype.value,
        page_tokens=page_tokens,
        kv_memory=None if kv_memory == "auto" else kv_memory,
    ) as llm:
        print_completion(llm, prompt, sampling)


@app.command()
def demo(
    url: Annotated[
        str, typer.Option(help="A running server. Where none answers, one is started for the time of the demo.")
    ] = "http://127.0.0.1:8000",
    tokens: Annotated[int, typer.Option(help="Length of the log and the question together.")] = 16_384,
    depth: Annotated[float, typer.Option(help="Where the fact stands: 0 is the beginning, 1 the end.")] = 0.35,
    seed: Annotated[int, typer.Option(help="Another seed is another log.")] = 7,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of a server that is started.")] = 2,
) -> None:
    """Ask for one fact in a long log, and show which rank held it.

    Exit code 0: the answer was right; 1: it was wrong, or something failed.
    """
    from leanserve.bundled.demo import DemoOptions, run_demo

    sys.exit(0 if run_demo(DemoOptions(url=url, tokens=tokens, depth=depth, seed=seed, ranks=ranks)) else 1)


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A directory with a config.json, or a hub id. Default: the bundled model."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Type of GPU; a wrong one lists all.", rich_help_panel=RANKS)] = "H200",
    ranks: Annotated[int, typer.Option(metavar="N", help="GPUs.", rich_help_panel=RANKS)] = 1,
    context: Annotated[
        str,
        typer.Option(metavar="TOKENS", help="Of each sequence, such as 131072, 128k or 1M.", rich_help_panel=MEMORY),
    ] = "auto",
    concurrency: Annotated[int, typer.Option(metavar="N", help="Sequences at once.", rich_help_panel=MEMORY)] = 1,
    dtype: Annotated[
        DTypeChoice, typer.Option(help="Of weights and KV. auto: the checkpoint's own.", rich_help_panel=MODEL)
    ] = DTypeChoice.auto,
    page_tokens: PageTokens = 64,
    kv_memory: KvMemory = "auto",
    max_batch_tokens: MaxBatchTokens = 2048,
    max_sequences: MaxSequences = 256,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with constants that you measured.", rich_help_panel=RANKS)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw a PNG (needs matplotlib).", rich_help_panel=MODEL)
    ] = None,
) -> None:
    """Memory and estimated time of a deployment, before you rent the GPUs. Reads config.json only."""
    from rich.console import Console

    from leanserve.bundled import bundled_model_dir
    from leanserve.contracts.config import BatchOptions
    from leanserve.launch.options import parse_bytes
    from leanserve.planner.gpus import find_gpu
    from leanserve.planner.plan import Question, find_architecture, make_plan, parse_tokens
    from leanserve.planner.report import draw_plan, print_plan
    from leanserve.planner.roofline import Constants

    architecture = find_architecture(bundled_model_dir() if model is None else model)
    question = Question(
        gpu=find_gpu(gpu),
        ranks=ranks,
        context_tokens=architecture.max_positions if context == "auto" else parse_tokens(context),
        sequences=concurrency,
        dtype=architecture.checkpoint_dtype if dtype is DTypeChoice.auto else dtype.value,
        page_tokens=page_tokens,
        kv_bytes_per_rank=None if kv_memory == "auto" else parse_bytes(kv_memory),
        batch=BatchOptions(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences),
    )
    result = make_plan(architecture, question, Constants() if calibrate is None else Constants.calibrated(calibrate))
    print_plan(result, Console(highlight=False))
    if plot is not None:
        draw_plan(result, plot)


@app.command()
def doctor(
    ranks: Annotated[
        str,
        typer.Option(
            metavar="N|auto", help="To start for the trial. auto: every usable GPU, else 2.", rich_help_panel=RANKS
        ),
    ] = "auto",
    device: DeviceOption = DeviceChoice.auto,
    comm: CommOption = CommChoice.auto,
    host: Annotated[str, typer.Option(help="Address a server is to listen on.", rich_help_panel=HTTP)] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Is it free?", rich_help_panel=HTTP)] = 8000,
) -> None:
    """Say what is here, and whether a server can work: versions, GPUs, memory, limits, and a trial of real ranks.

    The ranks start and meet as those of a server do, and time all-gathers of
    several sizes. What is wrong comes last, with what to do. The output can be
    pasted into a bug report: it holds no prompts, keys or variables.

    Exit code 1: something cannot work.
    """
    from leanserve.launch.doctor import Doctor
    from leanserve.launch.options import LaunchOptions

    count = _count_or_auto("--ranks", ranks)
    options = LaunchOptions(ranks=count, device=device.value, comm=comm.value)
    sys.exit(0 if Doctor(count, options, host=host, port=port).run() else 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"leanserve {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `leanserve` and `python -m leanserve`: an expected error is one line, and exit code 1."""
    try:
        app()
    except LeanServeError as error:
        typer.echo(f"leanserve: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
