"""The command line of `leanserve bench`. What is heavy is imported when a benchmark runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

__all__ = ["bench_app"]

bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine; every figure stands beside a peer's.")


@bench_app.callback()
def root() -> None:
    pass


def _numbers(text: str, option: str, *, at_least: int = 1) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= at_least for part in parts):
        raise typer.BadParameter(
            f"{text!r}; give whole numbers of at least {at_least}, with commas between them", param_hint=option
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _dtypes(text: str) -> tuple[Literal["float32", "bfloat16"], ...]:
    found: dict[Literal["float32", "bfloat16"], None] = {}
    for part in text.split(","):
        match part.strip():
            case "float32" | "bfloat16" as dtype:
                found[dtype] = None
            case _:
                raise typer.BadParameter(f"{text!r}; allowed are float32, bfloat16 or both", param_hint="--dtypes")
    return tuple(found)


@bench_app.command()
def engine(
    contexts: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Prompt tokens of each sequence, at least 2. Default: 512,4096,16384."),
    ] = None,
    batches: Annotated[str | None, typer.Option(metavar="N,...", help="Sequences at once. Default: 1,8.")] = None,
    dtypes: Annotated[
        str | None, typer.Option(metavar="DTYPE,...", help="Of weights and KV. Default: float32,bfloat16.")
    ] = None,
    ranks: Annotated[str, typer.Option(metavar="N,...", help="Rank counts of LeanServe.")] = "1,2",
    max_prefill_tokens: Annotated[
        int,
        typer.Option(metavar="N", help="No time to first token where batch x context is more: it takes minutes each."),
    ] = 8 * 4096,
    all_prefills: Annotated[bool, typer.Option("--all-prefills", help="Time to first token everywhere.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Defaults become contexts 512,4096, batch 1, float32: about a minute.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A tiny model, to try the command; its figures say nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", file_okay=False, help="Write engine.json and engine.png here.")
    ] = None,
) -> None:
    """Decode speed and time to first token on this machine's CPU, beside transformers `generate`.

    A random Llama of 0.2B parameters (8 layers, hidden 1024, 16 query and 8
    KV heads of 128) is made in a temporary directory. Every system has the
    same dtype and the same threads in all (the cores, or OMP_NUM_THREADS),
    and they take turns at every cell of the grid. Decode is measured on
    caches filled with random numbers, so long contexts cost no prefill; time
    to first token is a real prefill. The whole grid takes about half an hour
    on 2 idle cores.
    """
    from leanserve.bench.engine import Grid, run_engine_bench
    from leanserve.bench.random_model import STANDARD, TINY
    from leanserve.bench.report import print_report, write_report

    grid = Grid(
        dtypes=_dtypes(dtypes or ("float32" if quick else "float32,bfloat16")),
        contexts=_numbers(contexts or ("512,4096" if quick else "512,4096,16384"), "--contexts", at_least=2),
        batches=_numbers(batches or ("1" if quick else "1,8"), "--batches"),
        ranks=_numbers(ranks, "--ranks"),
        max_prefill_tokens=None if all_prefills else max_prefill_tokens,
        model=TINY if tiny else STANDARD,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    report = run_engine_bench(grid, Console(stderr=True))
    if out is not None:
        write_report(report, out)
    print_report(report, Console())
    if report.ended_early is not None:
        raise typer.Exit(1)


@bench_app.command()
def recovery(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: the bundled model.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks on this machine's CPU.")] = 2,
    step_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="As of leanserve serve.")] = 5.0,
    runs: Annotated[int, typer.Option(min=1, help="Of each attack.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="DIR", file_okay=False, help="Write recovery.json here.")] = None,
) -> None:
    """Time from SIGKILL, and from SIGSTOP, of a rank to the first token that a stream gets after it."""
    from leanserve.bench.recovery import run_recovery_bench

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    run_recovery_bench(model=model, ranks=ranks, step_timeout_s=step_timeout, runs=runs, out=out)


@bench_app.command()
def frontend(
    streams: Annotated[int, typer.Option(metavar="N", min=1, help="Streams at once.")] = 64,
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of each stream.")] = 500,
) -> None:
    """What HTTP costs: chunks a second, the idle time to a first chunk, and long prompts; no model is computed.

    The chunk rate stands beside that of a bare StreamingResponse, which yields
    ready bytes to the same number of streams in the same run, in turn.
    """
    from leanserve.bench.frontend import print_frontend_figures, run_frontend_bench

    figures = run_frontend_bench(streams, tokens, Console(stderr=True))
    print_frontend_figures(figures, Console())
