"""`leanserve demo`: one fact in a long log, asked for over HTTP, and the whereabouts of its page told."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from leanserve.bundled.client import Answer, ask, served_model
from leanserve.bundled.corpus import NeedlePrompt, make_prompt
from leanserve.bundled.own_server import own_server
from leanserve.contracts.errors import ConfigError
from leanserve.launch.front_end import BUNDLED_NAME
from leanserve.launch.options import LaunchOptions
from leanserve.launch.own_address import is_loopback

__all__ = ["DemoOptions", "run_demo"]

MAX_TOKENS = 32
"""More than any answer of the corpus has."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `leanserve demo` was asked for."""

    url: str
    tokens: int
    """Of the prompt."""
    depth: float
    """Of the fact, 0 to 1."""
    seed: int
    """Of the log."""
    ranks: int
    """Of the server that is started when none answers."""


def run_demo(options: DemoOptions) -> bool:
    """Ask a server, one's own if none answers at the URL, and print what happened. Returns whether it was right.

    Raises:
        ConfigError: an option cannot work.
        EngineError: the server failed.
    """
    console, progress = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        prompt = make_prompt(options.tokens, options.depth, options.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with _ended_by_sigterm(), _server(options, progress) as url:
        console.print(f"[bold]{prompt.text.partition(chr(10))[0]}[/], {options.tokens:,} tokens, seed {options.seed}")
        console.print(f"  question     {prompt.question}")
        with _progress_bar(progress) as draw:
            answer = ask(url, prompt.text, MAX_TOKENS, draw)
    _report(prompt, answer, console)
    return prompt.answer in answer.text


@contextmanager
def _progress_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Draws how much of the prompt is read, on a terminal."""
    columns = (TextColumn("reading the log"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _server(options: DemoOptions, progress: Console) -> Iterator[str]:
    """The URL of a server that answers."""
    name = served_model(options.url)
    if name is not None:
        if name != BUNDLED_NAME:
            note = f"Note: {options.url} serves {name}; the log is written for the model that ships with LeanServe."
            progress.print(escape(note), soft_wrap=True)
        yield options.url
        return
    parts = urlsplit(options.url)
    host = parts.hostname or ""
    if parts.scheme != "http" or not is_loopback(host):
        raise ConfigError(f"no server answers at {options.url}; start one there, or leave --url out to have one here")
    plural = "" if options.ranks == 1 else "s"
    progress.print(f"No server answers at {options.url}: starting one with {options.ranks} rank{plural}.")
    with own_server(LaunchOptions(ranks=options.ranks), progress, host=host, port=parts.port or 80) as url:
        yield url


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves the block in order, as Ctrl-C does."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(prompt: NeedlePrompt, answer: Answer, console: Console) -> None:
    start, end = prompt.fact_token, prompt.fact_end
    console.print(f"  the fact     tokens {start:,} to {end - 1:,}, {start / answer.prompt_tokens:.0%} of the way in")
    console.print(f"  held by      {_holders(prompt, answer)}")
    computed = answer.prompt_tokens - answer.cached_tokens
    cached = f", {answer.cached_tokens:,} more were cached" if answer.cached_tokens else ""
    rate = f"{computed / answer.first_token_s:,.0f}" if answer.first_token_s else "no"
    console.print(f"  first token  after {answer.first_token_s:.2f} s: {rate} prompt tokens/s{cached}")
    if answer.tokens_per_s is not None:
        console.print(f"  then         {answer.tokens_per_s:.1f} tokens/s")
    console.print(f"  answer       {escape(answer.text.strip())}")
    verdict = "[green]Right[/]" if prompt.answer in answer.text else "[red]Wrong[/]"
    console.print(f"{verdict}: the log says {prompt.answer}.")


def _holders(prompt: NeedlePrompt, answer: Answer) -> str:
    owners = answer.page_owners
    if owners is None:
        return "a rank that this server does not tell"
    ranks = owners.of(prompt.fact_token, prompt.fact_end)
    held = f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(map(str, ranks))}"
    shares = [owners.ranks.count(rank) for rank in range(max(owners.ranks) + 1)]
    return f"{held}; pages of {owners.page_tokens} tokens by rank: {', '.join(map(str, shares))}"
