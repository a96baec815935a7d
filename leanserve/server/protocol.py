"""The bodies of requests, checked strictly: true is not 1, "3" is not 3, and NaN is not a number.

JSON is read by pydantic itself, which also refuses lone surrogates, deep nesting and numbers of thousands of digits.
"""

import json
from typing import Annotated, Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from leanserve.contracts.errors import RequestError
from leanserve.contracts.sampling import (
    MAX_CACHE_SALT_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from leanserve.server.errors import validation_error

__all__ = ["CompletionRequest", "DetokenizeRequest", "ErrorBody", "StreamOptions", "TokenizeRequest"]

_MAX_STOP_CHARS = 256
_INT32_MAX = 2**31 - 1

_TokenIds = Annotated[list[int], Field(fail_fast=True)]
_TokenIdLists = Annotated[list[_TokenIds], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True)]

_PROMPT_FORMS = "a string, a list of token ids, a list of strings, or a list of lists of token ids"
_EXPECTED = {
    "tokens": "a list of token ids",
    "stop": f"a string or a list of at most {MAX_STOP_STRINGS} strings, each of 1 to {_MAX_STOP_CHARS} characters",
    "stop_token_ids": f"a list of at most {MAX_STOP_TOKEN_IDS} token ids",
}

_NOT_HONOURED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "echo": (False,),
    "logprobs": (),
    "prompt_logprobs": (),
    "top_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "return_progress": (False,),
    "return_tokens_as_token_ids": (False,),
    "prompt_embeds": (),
    "messages": (),
    "return_token_strs": (False,),
    "logits_processors": ([],),
}
"""Fields that other servers honour and this one does not, with the values that change nothing; null is always one."""


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class _Body(_Object):
    expected: ClassVar[dict[str, str]] = _EXPECTED
    """What fields of several types may hold, for messages."""

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
        _refuse_what_is_not_honoured(request.model_extra or {})
        request.check()
        return request

    def check(self) -> None:
        """Raises: RequestError where fields contradict each other."""

    @classmethod
    def openapi(cls) -> dict[str, Any]:
        """The request body as OpenAPI writes it, without references."""
        schema = cls.model_json_schema()
        definitions = schema.pop("$defs", {})
        text = json.dumps(schema)
        for name, definition in definitions.items():
            text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
        return {"required": True, "content": {"application/json": {"schema": json.loads(text)}}}

    @property
    def unknown_fields(self) -> int:
        """How many fields nobody here has heard of."""
        return sum(name not in _NOT_HONOURED for name in self.model_extra or {})


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


class StreamOptions(_Object):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    """A last chunk with the token counts and no choices."""
    continuous_usage_stats: bool | None = None
    """With include_usage: the counts so far in every chunk."""


class CompletionRequest(_Body):
    """POST /v1/completions."""

    expected: ClassVar[dict[str, str]] = {"prompt": _PROMPT_FORMS, **_EXPECTED}

    prompt: Annotated[_TokenIds | str | _TokenIdLists | _Texts, Field(union_mode="left_to_right")]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """Another name for max_tokens."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int | None, Field(le=_INT32_MAX)] = None
    min_p: float | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]],
            Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)] = None
    """Share cached prompts only with requests of the same salt."""
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Add token_ids to each choice."""
    return_page_owners: bool | None = None
    """Add page_owners to each choice (of a stream: to its first chunk): which rank holds each page of its prompt."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's own special tokens (BOS) around text prompts; true if left out."""
    skip_special_tokens: bool | None = None
    """Leave tokens such as `</s>` out of the text; true if left out."""
    user: str | None = None
    """Accepted, not used."""

    def check(self) -> None:
        for name, value in (("n", self.n), ("best_of", self.best_of)):
            if value not in (None, 1):
                raise RequestError(f"{name} is {value}; only 1 is supported", param=name, code="unsupported_value")
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is given without stream: true", param="stream_options", code="invalid_value"
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens is {self.max_completion_tokens}; "
                "give one of them",
                param="max_completion_tokens",
                code="invalid_value",
            )

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many, all of one kind.

        Raises:
            RequestError: there is none, or an empty one.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt or not all(prompt):
            raise RequestError("prompt is empty; it must hold at least one token", param="prompt", code="empty_prompt")
        return prompt

    def sampling(self) -> SamplingParams:
        """The sampling options, left-out ones at their defaults.

        Raises:
            RequestError: a value outside its range.
        """
        given: dict[str, Any] = {
            "max_tokens": self.max_tokens if self.max_tokens is not None else self.max_completion_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "cache_salt": self.cache_salt,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


class TokenizeRequest(_Body):
    """POST /tokenize."""

    prompt: str
    add_special_tokens: bool | None = None


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    tokens: _TokenIds


def _refuse_what_is_not_honoured(extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        harmless = _NOT_HONOURED.get(name)
        if value is None or harmless is None:
            continue
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in harmless):
            raise RequestError(f"{name} is not supported by this server; leave it out", param=name, code="unsupported")
