"""A command whose options can also come from the environment and from a YAML file.

What is given on the command line counts first, then `LEANSERVE_<OPTION>`, then the file, then the default.
"""

import difflib
import os
from pathlib import Path
from typing import Any, cast

import typer
import yaml
from typer.core import TyperCommand

from leanserve.contracts.errors import ConfigError

__all__ = ["ConfiguredCommand", "use_config_file"]

_PREFIX = "LEANSERVE"
_NOT_OPTIONS = ("LEANSERVE_RUN_DIR", "LEANSERVE_AGENT_PID", "LEANSERVE_PULSE_HOST")
"""Set by one of our processes for another."""


class ConfiguredCommand(TyperCommand):
    """Reads `LEANSERVE_PORT` for `--port`, and so on. A variable that is nobody's option is told to the user."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for option in _options(self).values():
            option.show_envvar = False  # the command's own help says it once for all

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        names = {name.upper() for name in _options(self)}
        for variable in sorted(name for name in os.environ if name.startswith(f"{_PREFIX}_")):
            if variable not in _NOT_OPTIONS and variable.removeprefix(f"{_PREFIX}_") not in names | {"API_KEYS"}:
                close = difflib.get_close_matches(variable.removeprefix(f"{_PREFIX}_"), names, 1)
                hint = f"; did you mean {_PREFIX}_{close[0]}?" if close else ""
                typer.echo(f"leanserve: {variable} is set, and is no option of {info_name}{hint}", err=True)
        return super().make_context(info_name, args, parent, auto_envvar_prefix=_PREFIX, **extra)


def use_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of an eager `--config` option: the file's values become the defaults of the other options.

    Raises:
        ConfigError: the file cannot be read, or holds something that is no option.
    """
    if path is not None:
        options = _options(cast("TyperCommand", context.command))
        del options["config"]
        context.default_map = _read(path, options)
    return path


def _options(command: TyperCommand) -> dict[str, Any]:
    return {p.name: p for p in command.params if p.name is not None and p.name != "help"}


def _read(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration {path} holds {type(content).__name__}; write lines such as port: 8000")
    values: dict[str, Any] = {}
    for key, value in cast("dict[Any, Any]", content).items():
        name = str(key).replace("-", "_")
        if name not in options:
            close = difflib.get_close_matches(name, options, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"{path}: {key!s} is no option; {hint}allowed are {', '.join(sorted(options))}")
        is_list = bool(options[name].multiple) if hasattr(options[name], "multiple") else False
        given = cast("list[object]", value if isinstance(value, list) else [value])
        if any(not isinstance(item, str | int | float) for item in given) or (isinstance(value, list) and not is_list):
            allowed = "one value or a list of values" if is_list else "one number, one word, true or false"
            raise ConfigError(f"{path}: {key!s} is {value!r}; it must be {allowed}")
        values[name] = given if is_list else value
    return values
