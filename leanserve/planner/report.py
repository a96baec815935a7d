"""A plan on paper: a table for the terminal, a picture for a slide."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from leanserve.planner.plan import Plan

__all__ = ["draw_plan", "print_plan"]

GIB = 2**30


def print_plan(plan: Plan, console: Console) -> None:
    """What fits, and an estimate of how fast it is."""
    question, architecture = plan.question, plan.architecture
    gpu = question.gpu
    console.print(
        f"[bold]{architecture.describe()}[/], {question.dtype}, on {question.ranks} x {gpu.name} "
        f"({gpu.memory_bytes / GIB:.0f} GiB usable); {question.sequences} x {question.context_tokens:,} tokens"
    )
    for table in (_memory_table(plan), _time_table(plan), _ranks_table(plan)):
        console.print(table)
    for line in _advice(plan):
        console.print(line)
    constants = plan.constants
    console.print(
        "[dim]Memory is exact but for what the driver takes. Times are estimates: "
        f"{constants.bandwidth_share:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{constants.flops_share:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s, {constants.collective_us:g} us a collective, "
        f"{constants.link_share:.0%} of {gpu.link / 1e9:,.0f} GB/s between ranks ({gpu.source}). "
        "--calibrate replaces them by what you measured.[/]"
    )


def _memory_table(plan: Plan) -> Table:
    table = _table(
        "Memory of one rank",
        ("weights", "GiB", "activations GiB", "KV GiB", "KV bytes a token", "longest context", "sequences"),
    )
    for deployment in plan.asked:
        memory = deployment.memory
        table.add_row(
            deployment.split,
            f"{memory.weights / GIB:.1f}",
            f"{memory.activations / GIB:.1f}",
            f"{memory.kv_bytes / GIB:.1f}" if deployment.fits else "does not fit",
            f"{memory.kv_bytes_per_token:,}",
            f"{deployment.longest_context_tokens:,}",
            f"{deployment.sequences:,}",
        )
    return table


def _time_table(plan: Plan) -> Table:
    table = _table(
        "Estimated time",
        ("weights", "prefill s", "decode ms", "= weights", "+ KV", "+ collectives", "+ kernels", "tokens/s"),
    )
    for deployment in plan.asked:
        decode = deployment.decode
        table.add_row(
            deployment.split,
            f"{deployment.prefill.total_s:.2f}",
            f"{decode.total_ms:.2f}",
            f"{decode.weights_ms:.2f}",
            f"{decode.kv_ms:.2f}",
            f"{decode.collectives_ms:.2f}",
            f"{decode.kernels_ms:.2f}",
            f"{plan.question.sequences * 1e3 / decode.total_ms:,.0f}",
        )
    return table


def _ranks_table(plan: Plan) -> Table:
    table = _table(
        "Fewer ranks, each with its best split",
        ("ranks", "weights", "cache tokens", "longest context", "sequences", "prefill s", "decode ms"),
    )
    for deployment in plan.by_ranks:
        table.add_row(
            str(deployment.ranks),
            deployment.split,
            f"{deployment.cache_tokens:,}" if deployment.fits else "does not fit",
            f"{deployment.longest_context_tokens:,}",
            f"{deployment.sequences:,}",
            f"{deployment.prefill.total_s:.2f}",
            f"{deployment.decode.total_ms:.2f}",
        )
    return table


def _table(title: str, headings: tuple[str, ...]) -> Table:
    """One space between columns and no lines: no figure may be cut where a terminal, or a pipe, is 80 wide."""
    table = Table(
        title=f"\n{title}", title_justify="left", box=None, header_style="bold", pad_edge=False, collapse_padding=True
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    return table


def _advice(plan: Plan) -> list[str]:
    """What a reader should know before renting."""
    question = plan.question
    able = [deployment for deployment in plan.asked if deployment.sequences >= question.sequences]
    if not able:
        best = max(plan.asked, key=lambda deployment: deployment.cache_tokens)
        wanted = question.sequences * question.context_tokens
        seen = f"{wanted:,} tokens are asked for; the ranks hold {best.cache_tokens:,} with --weights {best.split}"
        return [f"[red]Does not fit:[/] {seen}. Use more ranks, fewer sequences or shorter contexts."]
    fastest = min(able, key=lambda deployment: deployment.decode.total_ms)
    advice = [f"Fits; fastest decode: [bold]--weights {fastest.split}[/], {fastest.decode.total_ms:.2f} ms a step."]
    if 1 < question.ranks <= plan.architecture.num_kv_heads:
        heads = f"With {plan.architecture.num_kv_heads} KV heads and {question.ranks} GPUs, tensor parallelism by heads"
        advice.append(f"{heads} splits the same reads with fewer bytes between ranks, and is as good a choice.")
    return advice


def draw_plan(plan: Plan, path: Path) -> None:
    """Write a PNG: a decode step's parts, and the longest context, for each number of ranks. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    time_axes, context_axes = figure.subplots(1, 2)
    places = range(len(plan.by_ranks))
    labels = [f"{deployment.ranks}\n{deployment.split}" for deployment in plan.by_ranks]
    below = [0.0] * len(labels)
    for name in ("weights", "kv", "collectives", "kernels"):
        heights = [getattr(deployment.decode, f"{name}_ms") for deployment in plan.by_ranks]
        time_axes.bar(places, heights, bottom=below, label="KV" if name == "kv" else name)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    time_axes.set(ylabel="estimated ms a step (lower is better)", xlabel="ranks, weights")
    time_axes.legend()
    context_axes.bar(places, [deployment.cache_tokens / 2**20 for deployment in plan.by_ranks], color="tab:green")
    wanted = plan.question.sequences * plan.question.context_tokens / 2**20
    context_axes.axhline(wanted, color="black", linestyle="--", label="asked for")
    context_axes.set(ylabel="M tokens in the KV cache (higher is better)", xlabel="ranks, weights")
    context_axes.legend()
    for axes in (time_axes, context_axes):
        axes.set_xticks(list(places), labels)
    figure.suptitle(
        f"{plan.architecture.describe()}, {plan.question.dtype}, {plan.question.gpu.name}; "
        f"{plan.question.sequences} x {plan.question.context_tokens:,} tokens"
    )
    figure.savefig(path, dpi=120)
