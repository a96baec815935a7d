"""The help of every command can be read in a terminal of the usual widths."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from leanserve.__main__ import app
from leanserve.launch.model_options import DTypeChoice, WeightsChoice
from leanserve.launch.serve_command import LogLevelChoice
from leanserve.loadtest.arrivals import ArrivalKind
from leanserve.server.tool_calls import ToolFormat


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


COMMANDS = list(commands(typer.main.get_command(app)))


def help_of(words: tuple[str, ...], columns: int) -> str:
    shown = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb"}).invoke(app, [*words, "--help"])
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= columns
    return shown.output


@pytest.mark.parametrize("columns", [80, 120])
def test_no_name_is_cut(columns):
    assert len(COMMANDS) > 15
    for words, command in COMMANDS:
        text = help_of(words, columns)
        assert "…" not in text, words
        assert "[[" not in text, words
        if words == ("loadtest",):  # shows the help of its default command
            continue
        for parameter in command.params:
            names = [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")]
            missing = [name for name in names if name not in text]
            assert missing == [], words


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (("serve",), [*DTypeChoice, *WeightsChoice, *LogLevelChoice, *get_args(ToolFormat)]),
        (("plan",), [*DTypeChoice]),
        (("loadtest", "run"), [*get_args(ArrivalKind)]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_no_choice_is_broken(words, choices):
    shown = set(re.findall(r"\w+", help_of(words, 80)))
    assert set(map(str, choices)) <= shown


def test_brackets_in_a_help_text_are_no_markup():
    assert "leanserve[otel]" in help_of(("serve",), 120)
