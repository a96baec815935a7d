"""What a client may ask of any generation, completion or chat: one set of fields, one way to sampling options."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from leanserve.contracts.errors import RequestError
from leanserve.contracts.sampling import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_CACHE_SALT_CHARS,
    MAX_LOGIT_BIASES,
    MAX_PRIORITY,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from leanserve.server.protocol import Body, JsonObject

__all__ = ["GenerationRequest", "JsonSchemaFormat", "ResponseFormat", "StreamOptions"]

_MAX_STOP_CHARS = 256


class StreamOptions(JsonObject):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    """A last chunk with the token counts and no choices."""
    continuous_usage_stats: bool | None = None
    """With include_usage: the counts so far in every chunk."""


class JsonSchemaFormat(JsonObject):
    """A named schema; `strict` is always honoured, so it changes nothing."""

    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(JsonObject):
    """What the text must look like, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structured_outputs(self) -> StructuredOutputsParams | None:
        """Raises: RequestError for a json_schema without a schema."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.json_schema is None:
            raise RequestError(
                'response_format has the type json_schema and no schema; give "json_schema": {"schema": {...}}',
                param="response_format",
                code="invalid_value",
            )
        return StructuredOutputsParams(json=self.json_schema.json_schema)


class GenerationRequest(Body):
    """Fields of every generation. What is left out has the default of `SamplingParams`."""

    expected: ClassVar[dict[str, str]] = {
        "stop": f"a string or a list of at most {MAX_STOP_STRINGS} strings, each of 1 to {_MAX_STOP_CHARS} characters",
        "stop_token_ids": f"a list of at most {MAX_STOP_TOKEN_IDS} token ids",
        "allowed_token_ids": f"a list of at most {MAX_ALLOWED_TOKEN_IDS} token ids",
        "logit_bias": f"an object of at most {MAX_LOGIT_BIASES} token ids with numbers from -100 to 100",
        "response_format": '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": '
        '{"schema": {...}}}',
        "structured_outputs": "an object with one of json, json_object, regex, choice and grammar",
    }

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """Another name for max_tokens."""
    min_tokens: int | None = None
    """Tokens before any end token or stop string may come."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=MAX_LOGIT_BIASES)] | None = None
    """Added to the logits of token ids."""
    allowed_token_ids: Annotated[list[int], Field(max_length=MAX_ALLOWED_TOKEN_IDS, fail_fast=True)] | None = None
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
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    """What the text must look like, under vLLM's names."""
    truncate_prompt_tokens: int | None = None
    """Keep only so many of the prompt's last tokens."""
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)] = None
    """Share cached prompts only with requests of the same salt."""
    priority: Annotated[int | None, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = None
    """Lower is more urgent; 0 if left out."""
    n: int | None = None
    """Choices for each prompt."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    """In a stream, before the first token: chunks that say how far the prompt is (prompt_progress)."""
    return_token_ids: bool | None = None
    """Add token_ids to each choice."""
    return_tokens_as_token_ids: bool | None = None
    """In logprobs, write tokens as `token_id:5`."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's own special tokens (BOS) around text."""
    skip_special_tokens: bool | None = None
    """Leave tokens such as `</s>` out of the text; true if left out."""
    user: str | None = None
    """Accepted, not used."""

    def check(self) -> None:
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

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer puts its own special tokens around text."""
        return self.add_special_tokens is not False

    @property
    def given_max_tokens(self) -> int | None:
        """max_tokens, under either name."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens are told with each generated one; None: no log-probabilities at all."""
        return None

    def num_prompt_logprobs(self) -> int | None:
        """The same for prompt tokens."""
        return None

    def sampling(self, *, default_max_tokens: int | None = None) -> SamplingParams:
        """The sampling options, left-out ones at their defaults.

        Raises:
            RequestError: a value outside its range.
        """
        given: dict[str, Any] = {
            "n": self.n,
            "max_tokens": default_max_tokens if self.given_max_tokens is None else self.given_max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self._logit_bias(),
            "allowed_token_ids": self.allowed_token_ids,
            "logprobs": self.num_logprobs(),
            "prompt_logprobs": self.num_prompt_logprobs(),
            "structured_outputs": self._structured_outputs(),
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "cache_salt": self.cache_salt,
            "priority": self.priority,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    def _logit_bias(self) -> dict[int, Any] | None:
        if self.logit_bias is None:
            return None
        wrong = next((key for key in self.logit_bias if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
        if wrong is not None:
            raise RequestError(
                f"logit_bias has the key {wrong[:50]!r}; keys are token ids", param="logit_bias", code="invalid_value"
            )
        return {int(key): value for key, value in self.logit_bias.items()}

    def _structured_outputs(self) -> StructuredOutputsParams | dict[str, Any] | None:
        wished = None if self.response_format is None else self.response_format.structured_outputs()
        if self.structured_outputs is None:
            return wished
        if wished is not None:
            raise RequestError(
                "response_format and structured_outputs are both given; give one of them",
                param="structured_outputs",
                code="invalid_value",
            )
        return {name: value for name, value in self.structured_outputs.items() if value is not None}
