"""`leanserve generate`: one completion on a terminal, as it comes."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from leanserve.contracts.messages import PrefillProgress
from leanserve.contracts.sampling import SamplingParams
from leanserve.llm import LLM, Prompt

__all__ = ["print_completion"]


def print_completion(llm: LLM, prompt: Prompt, sampling: SamplingParams) -> None:
    """Write a completion to standard output as it is generated, and its speed to standard error."""
    started = time.perf_counter()
    first_token_s, tokens = None, 0
    columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    reading = bar.add_task("", total=None)

    def draw(progress: PrefillProgress) -> None:
        bar.start()
        bar.update(reading, completed=progress.processed_tokens, total=progress.total_tokens)

    try:
        for delta in llm.stream(prompt, sampling, on_progress=draw):
            if first_token_s is None:
                first_token_s = time.perf_counter() - started
                bar.stop()
            tokens += len(delta.token_ids)
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    finally:  # Ctrl-C, or an engine that fails: the terminal gets its cursor back
        bar.stop()
    sys.stdout.write("\n")
    sys.stdout.flush()
    decode_s = time.perf_counter() - started - (first_token_s or 0.0)
    rate = f", then {(tokens - 1) / decode_s:.1f} tokens/s" if tokens > 1 else ""
    Console(stderr=True, highlight=False).print(
        f"[dim]{tokens} tokens, the first after {first_token_s or 0.0:.2f} s{rate}[/]"
    )
