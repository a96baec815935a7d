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
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Default: the bundled model.")] = None,
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
    out: Annotated[Path | None, typer.Option(metavar="DIR", file_okay=False, help="Write frontend.json here.")] = None,
) -> None:
    """What HTTP costs: chunks a second, the idle time to a first chunk, and long prompts; no model is computed.

    The chunk rate stands beside that of a bare StreamingResponse, which yields
    ready bytes to the same number of streams in the same run, in turn.
    """
    from leanserve.bench.frontend import print_frontend_figures, run_frontend_bench, write_frontend_figures

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    figures = run_frontend_bench(streams, tokens, Console(stderr=True))
    if out is not None:
        write_frontend_figures(figures, out)
    print_frontend_figures(figures, Console())


@bench_app.command()
def gpu(
    out: Annotated[Path | None, typer.Option(metavar="DIR", file_okay=False, help="Write gpu.json here.")] = None,
    ranks: Annotated[
        str, typer.Option(metavar="N,...", help="Rank counts that must give the same tokens, all on one GPU.")
    ] = "1,2,3",
    budget_s: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Begin nothing after this time. Default: no end.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A tiny model, on the CPU too, to try the command; its figures say nothing.")
    ] = False,
) -> None:
    """Decode on one GPU: step time and where it goes, with and without CUDA graphs and fused kernels.

    A random Llama of 1.5B parameters in bfloat16, at 1k, 32k and 128k tokens,
    beside the time to read its weights and KV once at the bandwidth that is
    measured here. At every cell the logits of a replayed step must be those
    of an eager one, bit for bit; and ranks that share the GPU through Gloo
    must give the tokens of one rank, in float32. Several minutes. Exits
    with 1 if a check fails.
    """
    from leanserve.bench.gpu import run_gpu_bench
    from leanserve.bench.gpu_report import GpuReport, print_gpu_report, write_gpu_report

    counts = _numbers(ranks, "--ranks")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    def save(report: GpuReport) -> None:
        if out is not None:
            write_gpu_report(report, out)

    report = run_gpu_bench(counts, Console(stderr=True), tiny=tiny, budget_s=budget_s, save=save)
    print_gpu_report(report, Console())
    if not all(check.passed for check in report.checks):
        raise typer.Exit(1)


@bench_app.command()
def prefill(
    ranks: Annotated[str, typer.Option(metavar="N,...", help="Rank counts of LeanServe.")] = "1,2,4",
    quick: Annotated[bool, typer.Option("--quick", help="An eighth of the lengths.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A few tokens of a tiny model, to try the command; its figures say nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", file_okay=False, help="Write prefill.json and prefill.png here.")
    ] = None,
) -> None:
    """Long prompts on this machine's CPU: waits beside one, prefill and decode speed, a prefix in common.

    A prompt of 65,000 tokens is computed by the bundled model while four
    streams run and requests of 100 tokens arrive. Then a random model of its
    size is prefilled with 1k, 8k and 32k tokens and decodes at 1k, 16k and
    64k, beside transformers `generate`; and 8 requests that begin with the
    same 16k tokens are served with the prefix cache and without.
    """
    from leanserve.bench.prefill import PrefillGrid, run_prefill_bench
    from leanserve.bench.prefill_report import print_prefill_report, write_prefill_report
    from leanserve.bench.random_model import SMALL, TINY

    part = 512 if tiny else 8 if quick else 1
    grid = PrefillGrid(
        host_tokens=2**20 // part,
        long_prompt_tokens=max(65_000 // part, 3 * 2048),
        prefill_tokens=tuple(max(tokens // part, 16) for tokens in (1024, 8192, 32_768)),
        decode_tokens=tuple(max(tokens // part, 16) for tokens in (1024, 16_384, 65_536)),
        shared_tokens=max(16_384 // part, 64),
        sharers=8,
        ranks=_numbers(ranks, "--ranks"),
        model=TINY if tiny else SMALL,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    report = run_prefill_bench(grid, Console(stderr=True))
    if out is not None:
        write_prefill_report(report, out)
    print_prefill_report(report, Console())
    if report.ended_early is not None:
        raise typer.Exit(1)


@bench_app.command()
def multigpu(
    ranks: Annotated[
        str | None, typer.Option(metavar="N,...", help="Rank counts. Default: 1, 2, 4, ... and all GPUs.")
    ] = None,
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="cpu tries the script over Gloo, without a GPU.")
    ] = "cuda",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A tiny model, to try the command; its figures say nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", file_okay=False, help="Write multigpu.json here.")] = None,
) -> None:
    """Parity and scaling of several ranks on several GPUs, under NCCL.

    Ends with code 1 where a rank count answers otherwise than the first, and
    says what cannot be shown on this machine.
    """
    from leanserve.bench.multigpu import MultigpuGrid, gpus_for, print_multigpu_report, run_multigpu_bench
    from leanserve.bench.random_model import STANDARD, TINY

    asked = None if ranks is None else _numbers(ranks, "--ranks")
    grid = MultigpuGrid(
        ranks=gpus_for(asked) if device == "cuda" else asked or (1, 2),
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
        parity_tokens=150 if tiny else 1000,
        prefill_tokens=(128,) if tiny else (1024, 32_768) if device == "cuda" else (1024,),
        decode_tokens=(128,) if tiny else (1024, 32_768, 131_072) if device == "cuda" else (1024, 16_384),
        model=TINY if tiny else STANDARD,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    report = run_multigpu_bench(grid, Console(stderr=True))
    if out is not None:
        (out / "multigpu.json").write_bytes(report.to_json())
    print_multigpu_report(report, Console())
    if not report.all_alike:
        raise typer.Exit(1)
