"""A process that renders chat templates and does nothing else, so that a hostile one hurts nobody.

A template is code from a checkpoint. Here it runs in jinja2's sandbox, without attributes that begin with an
underscore, without anything it could change, open or import; and its process ends when it takes too long.

`python -m leanserve.server.template_renderer`; frames on standard input and output are four bytes of length, the most
significant first, and JSON. The first frame holds the templates and the limits, each further one a rendering to do.
Every frame is answered by one: `+` and the text, or `-` and what went wrong, in UTF-8.
"""

import contextlib
import json
import os
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["main", "make_environment"]

_MAX_ERROR_CHARS = 300


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks, for training, what the model wrote. Here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates on the hub are written for: block trimming, loop controls, `tojson` without HTML
    escapes, `raise_exception`, `strftime_now`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    known = cast("dict[str, Any]", environment.globals)  # pyright: ignore[reportUnknownMemberType]
    kept = {name: known[name] for name in ("range", "namespace", "joiner", "cycler")}
    known.clear()
    known.update(kept, dict=_make_dict, raise_exception=_raise, strftime_now=_now)
    filters = cast("dict[str, Any]", environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters["tojson"] = _to_json
    return environment


def _make_dict(*pairs: Any, **entries: Any) -> dict[Any, Any]:
    return dict(*pairs, **entries)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read(stream: BinaryIO) -> Any:
    """The next frame; None at the end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    return json.loads(stream.read(int.from_bytes(head, "big")))


def _write(stream: BinaryIO, answer: str) -> None:
    body = answer.encode("utf-8", "replace")
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


def _limit_resources(memory_bytes: int) -> None:
    """No more memory, no file of any length, no core dump. macOS knows some of these and ignores others."""
    import resource

    for kind, limit in (("RLIMIT_AS", memory_bytes), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, kind), (limit, limit))


def _render(templates: dict[str, jinja2.Template], order: dict[str, Any], max_chars: int) -> str:
    parts: list[str] = []
    length = 0
    for part in templates[order["template"]].generate(**order["variables"]):
        length += len(part)
        if length > max_chars:
            return f"-its text is longer than {max_chars} characters"
        parts.append(part)
    return "+" + "".join(parts)


def main() -> None:
    """Serve until standard input ends."""
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write between the frames
    setup = _read(orders)
    if setup is None:
        return
    _limit_resources(setup["memory_bytes"])
    environment = make_environment()
    templates: dict[str, jinja2.Template] = {}
    order: Any = None
    broken: str | None = None
    while True:
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])  # SIGPROF, which nobody handles, ends the process
        try:
            if order is None:
                templates = {name: environment.from_string(text) for name, text in setup["templates"].items()}
                answer = "+"
            elif broken is not None:
                answer = broken
            else:
                answer = _render(templates, order, setup["max_chars"])
        except MemoryError:
            answer = f"-it needs more than {setup['memory_bytes']} bytes of memory"
        except Exception as error:
            answer = f"-{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]
        signal.setitimer(signal.ITIMER_PROF, 0)
        if order is None and answer != "+":
            broken = answer
        _write(answers, answer)
        if (order := _read(orders)) is None:
            return


if __name__ == "__main__":
    main()
