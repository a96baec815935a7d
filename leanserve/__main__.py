"""The command line: serve | generate | demo | loadtest | plan | bench | doctor."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from leanserve import __version__
from leanserve.bench.commands import bench_app
from leanserve.contracts.errors import LeanServeError
from leanserve.launch.configured_command import ConfiguredCommand
from leanserve.launch.model_options import (
    BATCHING,
    DTYPES,
    MEMORY,
    MODEL,
    RANKS,
    AttentionChoice,
    AttentionOption,
    CommChoice,
    CommOption,
    DeviceChoice,
    DeviceOption,
    DType,
    DTypeChoice,
    EnforceEager,
    KvMemory,
    MaxBatchTokens,
    MaxSequences,
    PageTokens,
    Ranks,
    WeightsChoice,
    WeightsOption,
    count_or_auto,
    size_or_auto,
    tokens_or_auto,
)
from leanserve.launch.serve_command import HTTP, serve
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
app.command(cls=ConfiguredCommand)(serve)


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
    from leanserve.generate import print_completion
    from leanserve.llm import LLM

    if len(arguments) > 2:
        raise typer.BadParameter(f"expected [MODEL] PROMPT, got {len(arguments)} words; quote the prompt")
    prompt = sys.stdin.read() if arguments[-1] == "-" else arguments[-1]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with LLM(
        arguments[0] if len(arguments) == 2 else None,
        ranks=count_or_auto("--ranks", ranks),
        device=device.value,
        comm=comm.value,
        attention=attention.value,
        enforce_eager=enforce_eager,
        weights=weights.value,
        dtype=dtype.value,
        page_tokens=page_tokens,
        kv_memory=size_or_auto(kv_memory),
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
            metavar="MODEL", help="A directory with a config.json, or a hub id. Default: the bundled model."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Type of GPU; a wrong one lists all.", rich_help_panel=RANKS)] = "H200",
    ranks: Annotated[int, typer.Option(metavar="N", help="GPUs.", rich_help_panel=RANKS)] = 1,
    context: Annotated[
        str,
        typer.Option(metavar="TOKENS", help="Of each sequence, such as 131072, 128k or 1M.", rich_help_panel=MEMORY),
    ] = "auto",
    concurrency: Annotated[int, typer.Option(metavar="N", help="Sequences at once.", rich_help_panel=BATCHING)] = 1,
    dtype: Annotated[
        DTypeChoice,
        typer.Option(metavar=DTYPES, help="Of weights and KV. auto: the checkpoint's own.", rich_help_panel=MODEL),
    ] = DTypeChoice.auto,
    page_tokens: PageTokens = 64,
    kv_memory: KvMemory = "auto",
    max_batch_tokens: MaxBatchTokens = "auto",
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
    from leanserve.contracts.config import GPU_BATCH, BatchOptions
    from leanserve.launch.options import parse_bytes
    from leanserve.planner.gpus import find_gpu
    from leanserve.planner.plan import Question, find_architecture, make_plan
    from leanserve.planner.report import draw_plan, print_plan
    from leanserve.planner.roofline import Constants

    batch_tokens = tokens_or_auto("--max-batch-tokens", max_batch_tokens)
    architecture = find_architecture(bundled_model_dir() if model is None else model)
    question = Question(
        gpu=find_gpu(gpu),
        ranks=ranks,
        context_tokens=tokens_or_auto("--context", context) or architecture.max_context_tokens,
        sequences=concurrency,
        dtype=architecture.checkpoint_dtype if dtype is DTypeChoice.auto else dtype.value,
        page_tokens=page_tokens,
        kv_bytes_per_rank=None if kv_memory == "auto" else parse_bytes(kv_memory),
        batch=replace(
            GPU_BATCH if batch_tokens is None else BatchOptions(max_batch_tokens=batch_tokens),
            max_sequences=max_sequences,
        ),
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

    count = count_or_auto("--ranks", ranks)
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
