"""Asks a server for held-out facts, greedily, and compares what different numbers of ranks answer.

    python -m leanserve.bundled.needles DIRECTORY --ranks 1,3 --tokens 4096,16384,32768

starts a server of the checkpoint for each number of ranks, one after the other, and writes what it found into
DIRECTORY/evaluation.json, under "http", length by length. Exit code 1: two numbers of ranks gave different answers.

Questions about one document share it, so the prefix cache computes it once.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from leanserve.bundled.client import ask
from leanserve.bundled.corpus import Haystack
from leanserve.bundled.held_out import held_out, question_and_answer
from leanserve.bundled.own_server import own_server
from leanserve.launch.options import LaunchOptions

__all__ = ["Asked", "ask_needles"]

MAX_TOKENS = 32


@dataclass(frozen=True)
class Asked:
    """One question and what the server answered."""

    question: str
    answer: str
    """Greedy, without the end token's text."""
    token_ids: tuple[int, ...]
    right: bool
    """The answer is the whole answering sentence, and nothing else."""


def ask_needles(url: str, haystack: Haystack) -> Iterator[Asked]:
    """Asks for each fact of the haystack by itself.

    Raises:
        EngineError: the server refuses or fails.
    """
    for fact in haystack.facts:
        question, expected = question_and_answer(fact)
        answer = ask(url, haystack.text + question, MAX_TOKENS)
        yield Asked(fact.question, answer.text, answer.token_ids, answer.text == expected)


def _answers(directory: Path, ranks: int, lengths: list[int], documents: int) -> dict[int, list[Asked]]:
    console = Console(stderr=True)
    found: dict[int, list[Asked]] = {}
    with own_server(LaunchOptions(model=str(directory), ranks=ranks), console) as url:
        for tokens in lengths:
            numbers = track(range(documents), description=f"{ranks} ranks, {tokens:,} tokens", console=console)
            found[tokens] = [asked for number in numbers for asked in ask_needles(url, held_out(tokens, number))]
    return found


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m leanserve.bundled.needles", description=__doc__)
    parser.add_argument("directory", type=Path, help="a checkpoint directory")
    parser.add_argument("--ranks", type=_numbers, default=[1, 3], help="numbers of ranks; default 1,3")
    parser.add_argument("--tokens", type=_numbers, default=[4096, 16_384, 32_768], help="lengths of the documents")
    parser.add_argument("--documents", type=int, default=4, help="per length, each with ten facts; default 4")
    arguments = parser.parse_args()
    by_ranks = {
        ranks: _answers(arguments.directory, ranks, arguments.tokens, arguments.documents) for ranks in arguments.ranks
    }
    path = arguments.directory / "evaluation.json"
    evaluation: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    http: dict[str, Any] = evaluation.setdefault("http", {})
    first, *others = by_ranks.values()
    for tokens, answers in first.items():
        different = sum(
            len({asked.token_ids for asked in same}) > 1
            for same in zip(answers, *(other[tokens] for other in others), strict=True)
        )
        http[str(tokens)] = {
            "ranks": arguments.ranks,
            "answers": len(answers),
            "right": sum(asked.right for asked in answers),
            "different_between_ranks": different,
        }
        for asked in answers:
            if not asked.right:
                print(f"{tokens}: {asked.question} {asked.answer.strip()}")
    path.write_text(json.dumps(evaluation, indent=2) + "\n")
    print(json.dumps(http, indent=2))
    sys.exit(1 if any(figures["different_between_ranks"] for figures in http.values()) else 0)


if __name__ == "__main__":
    main()
