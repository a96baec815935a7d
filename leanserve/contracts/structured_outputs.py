"""What the text of a completion must look like: one request's wish, checked for its form.

Whether it is a grammar that can be served, `leanserve.grammars` finds out.
"""

import json
from typing import Any, cast

import msgspec

from leanserve.contracts.errors import RequestError

__all__ = ["MAX_CHOICES", "MAX_GRAMMAR_CHARS", "StructuredOutputsParams"]

MAX_GRAMMAR_CHARS = 128 * 1024
"""Of a schema as JSON, a regular expression, a grammar, or all choices together."""
MAX_CHOICES = 1024


class StructuredOutputsParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Exactly one of these, under vLLM's names.

    Raises:
        RequestError: none or several are given, or one that is empty, too long, or of the wrong type.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema, as text or as an object; kept as text."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """A regular expression for the whole text (Rust's syntax; no look-around, no back-references)."""
    choice: tuple[str, ...] | None = None
    """One of these texts."""
    grammar: str | None = None
    """A context-free grammar in Lark's syntax, with the rule `start`."""

    def __post_init__(self) -> None:
        if isinstance(self.json, dict):
            try:
                text = json.dumps(self.json, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise _refuse(f"json is no JSON schema: {error}") from None
            msgspec.structs.force_setattr(self, "json", text)
        if isinstance(self.choice, list):
            msgspec.structs.force_setattr(self, "choice", tuple(self.choice))
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            allowed = "give exactly one of json, json_object, regex, choice and grammar"
            raise _refuse(f"it holds {', '.join(given) or 'nothing'}; {allowed}")
        [name] = given
        if name == "json_object":
            if self.json_object is not True:
                raise _refuse("json_object must be true or false")
            return
        value: Any = getattr(self, name)
        texts = list(cast("tuple[Any, ...]", value)) if name == "choice" and isinstance(value, tuple) else [value]
        if not 1 <= len(texts) <= MAX_CHOICES or not all(isinstance(text, str) and text for text in texts):
            allowed = {"choice": f"a list of 1 to {MAX_CHOICES} texts", "json": "a JSON schema"}.get(name, "a text")
            raise _refuse(f"{name} must be {allowed}, and not empty")
        chars = sum(len(text) for text in texts)
        if chars > MAX_GRAMMAR_CHARS:
            raise _refuse(f"{name} has {chars} characters; at most {MAX_GRAMMAR_CHARS} are compiled")


def _refuse(message: str) -> RequestError:
    return RequestError(f"structured_outputs: {message}", param="structured_outputs", code="invalid_value")
