"""The body of POST /v1/completions."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from leanserve.contracts.errors import RequestError
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.generation_request import GenerationRequest
from leanserve.server.protocol import NOT_HONOURED, TokenIds

__all__ = ["CompletionRequest"]

_TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    expected: ClassVar[dict[str, str]] = {
        "prompt": "a string, a list of token ids, a list of strings, or a list of lists of token ids",
        **GenerationRequest.expected,
    }
    not_honoured: ClassVar[dict[str, tuple[object, ...]]] = {**NOT_HONOURED, "top_logprobs": ()}

    prompt: Annotated[TokenIds | str | _TokenIdLists | _Texts, Field(union_mode="left_to_right")]
    logprobs: int | None = None
    """Tell each token's log-probability and those of so many most likely ones, 0 to 20."""
    echo: bool | None = None
    """Put the prompt before the completion; with logprobs, its tokens' too."""
    best_of: int | None = None
    """Only what n is."""

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise RequestError(
                f"best_of is {self.best_of}; every choice that is generated is answered, so it may only be what n is",
                param="best_of",
                code="unsupported_value",
            )
        if self.given_max_tokens == 0 and not self.echo:
            raise RequestError(
                "max_tokens is 0; it must be at least 1, or come with echo: true",
                param="max_tokens",
                code="invalid_value",
            )

    @property
    def generates(self) -> bool:
        """False for echo with max_tokens 0: the prompt alone is answered."""
        return self.given_max_tokens != 0

    def prompts(self) -> list[str] | list[Sequence[int]]:
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

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    def sampling(self, *, default_max_tokens: int | None = None) -> SamplingParams:
        """The engine generates at least one token: one that is not answered where max_tokens is 0."""
        if self.generates:
            return super().sampling(default_max_tokens=default_max_tokens)
        least = self.model_copy(update={"max_tokens": 1, "max_completion_tokens": None})
        return least.sampling(default_max_tokens=default_max_tokens)
