"""What all request bodies have in common: strict checks. true is not 1, "3" is not 3, and NaN is not a number.

JSON is read by pydantic itself, which also refuses lone surrogates, deep nesting and numbers of thousands of digits.
"""

import json
from typing import Annotated, Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from leanserve.contracts.errors import RequestError
from leanserve.server.errors import validation_error

__all__ = [
    "NOT_HONOURED",
    "Body",
    "DetokenizeRequest",
    "ErrorBody",
    "JsonObject",
    "TokenIds",
]

TokenIds = Annotated[list[int], Field(fail_fast=True)]

NOT_HONOURED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "prompt_logprobs": (),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "prompt_embeds": (),
    "messages": (),
    "return_token_strs": (False,),
    "logits_processors": ([],),
}
"""Fields that other servers honour and this one does not, with the values that change nothing; null is always one."""


class JsonObject(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class Body(JsonObject):
    expected: ClassVar[dict[str, str]] = {}
    """What fields of several types may hold, for messages."""
    not_honoured: ClassVar[dict[str, tuple[object, ...]]] = NOT_HONOURED
    """What is refused, unless it is a declared field."""

    model: str | None = None
    """May be left out: one model is served."""

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read and check a body.

        Raises:
            RequestError: what is wrong with it.
        """
        try:
            request = cls.model_validate_json(body)
        except pydantic.ValidationError as error:
            raise validation_error(error, cls.expected) from None  # its repr holds the input
        request.refuse_what_is_not_honoured()
        request.check()
        return request

    def refuse_what_is_not_honoured(self) -> None:
        """Raises: RequestError for a field that would change the answer elsewhere, and would not here."""
        for name, value in (self.model_extra or {}).items():
            harmless = self.not_honoured.get(name)
            if value is None or harmless is None:
                continue
            if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in harmless):
                raise RequestError(
                    f"{name} is not supported by this route; leave it out", param=name, code="unsupported"
                )

    def check(self) -> None:
        """Raises: RequestError where fields contradict each other."""

    @classmethod
    def openapi(cls) -> dict[str, Any]:
        """The request body as OpenAPI writes it, without references."""
        schema = cls.model_json_schema()
        definitions = schema.pop("$defs", {})
        text = json.dumps(schema)
        while '"$ref"' in text:  # a definition may refer to others
            for name, definition in definitions.items():
                text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
        return {"required": True, "content": {"application/json": {"schema": json.loads(text)}}}

    @property
    def unknown_fields(self) -> int:
        """How many fields nobody here has heard of."""
        return sum(name not in self.not_honoured for name in self.model_extra or {})


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None
    """A stable short word."""


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


class DetokenizeRequest(Body):
    """POST /detokenize."""

    expected: ClassVar[dict[str, str]] = {"tokens": "a list of token ids"}

    tokens: TokenIds
