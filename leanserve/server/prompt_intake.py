"""Prompts as clients send them, turned into prompts as the engine takes them: tokenized, checked and packed.

Knows the model's facts and the server's limits for one request; knows nothing of the engine or of other requests.
"""

import asyncio
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from leanserve.contracts.errors import RequestError, RequestTooLongError
from leanserve.contracts.messages import EngineInfo
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from leanserve.grammars.grammar import check_grammar
from leanserve.server.generation_request import GenerationRequest
from leanserve.server.prompt_encoder import PromptEncoder
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer

__all__ = ["Prompt", "PromptIntake", "check_token_ids"]

_IDS_AT_ONCE = 1 << 16
"""Token ids checked and packed between two turns of the event loop: about 3 ms."""

_CONTEXT_IDS = 16
"""Prompt ids kept for the detokenizer."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine takes it."""

    token_ids: bytes
    """int32, native byte order."""
    num_tokens: int
    last_token_ids: list[int]
    text: str | None = None
    """Where it is to be told."""

    def ids(self) -> "array[int]":
        return array("i", self.token_ids)


class PromptIntake:
    """Belongs to one event loop; what takes long is done off it.

    Args:
        tokenizer: None takes token ids only.
    """

    def __init__(self, tokenizer: Tokenizer | None, settings: ServerSettings) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        self._encoder = None if tokenizer is None else PromptEncoder(tokenizer)
        self._grammar_checks = ThreadPoolExecutor(2, "grammar check")

    async def prepare(
        self,
        prompts: list[str] | list[Sequence[int]],
        request: GenerationRequest,
        sampling: SamplingParams,
        info: EngineInfo,
        *,
        keeps_text: bool = False,
    ) -> list[Prompt]:
        """Tokenize and check all prompts of a request, and whether its options can be met.

        Args:
            keeps_text: the prompts' text is wanted again.

        Raises:
            RequestError: text without a tokenizer, too many prompts, an empty one, an id out of the vocabulary, a
                grammar that cannot be used, too many log-probabilities.
            RequestTooLongError: a prompt that can never fit with its max_tokens.
        """
        if len(prompts) * sampling.n > self._settings.max_prompts:
            raise RequestError(
                f"{len(prompts)} prompts with n {sampling.n} ask for {len(prompts) * sampling.n} choices; "
                f"at most {self._settings.max_prompts} fit in one request",
                param="prompt" if sampling.n == 1 else "n",
                code="too_many_prompts",
            )
        if sampling.stop and self.tokenizer is None:
            raise RequestError(
                "stop strings need text, and this model has no tokenizer; use stop_token_ids",
                param="stop",
                code="no_tokenizer",
            )
        for param, token_ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("allowed_token_ids", sampling.allowed_token_ids),
            ("logit_bias", tuple(sampling.logit_bias or ())),
        ):
            check_token_ids(token_ids or (), info.vocab_size, param)
        if sampling.structured_outputs is not None:
            await self._check_grammar(sampling.structured_outputs)
        prepared: list[Prompt] = []
        for token_ids in await self._token_id_lists(prompts, request, sampling, info):
            if len(token_ids) + sampling.max_tokens > info.max_context_tokens:
                raise _too_long(f"{len(token_ids)} tokens", len(token_ids), request, sampling, info)
            packed = await _pack(token_ids, info.vocab_size)
            prepared.append(Prompt(packed, len(token_ids), list(token_ids[-_CONTEXT_IDS:])))
        self._check_logprobs(prepared, sampling)
        if keeps_text and self.tokenizer is not None:
            skips_special = request.skip_special_tokens is not False
            decode = self.tokenizer.decode
            prepared = [
                replace(
                    kept,
                    text=given
                    if isinstance(given, str) and sampling.truncate_prompt_tokens is None
                    else await asyncio.to_thread(decode, kept.ids(), skip_special_tokens=skips_special),
                )
                for given, kept in zip(prompts, prepared, strict=True)
            ]
        return prepared

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> "list[array[int]]":
        """int32 token ids of each text.

        Raises:
            RequestError: the model has no tokenizer.
            OverloadedError: many others wait for theirs.
        """
        self.text_tokenizer()
        assert self._encoder is not None
        return await self._encoder.encode(texts, add_special_tokens=add_special_tokens)

    def text_tokenizer(self) -> Tokenizer:
        """Raises: RequestError where the model has no tokenizer."""
        if self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer (its checkpoint has no tokenizer.json), so it takes token ids only: "
                'send prompt as a list of ids, with "return_token_ids": true',
                param="prompt",
                code="no_tokenizer",
            )
        return self.tokenizer

    async def close(self) -> None:
        """End the threads and processes that work on prompts."""
        if self._encoder is not None:
            await self._encoder.close()
        self._grammar_checks.shutdown(wait=False, cancel_futures=True)

    def _check_logprobs(self, prompts: list[Prompt], sampling: SamplingParams) -> None:
        if sampling.prompt_logprobs is None:
            return
        wanted = sum(prompt.num_tokens for prompt in prompts) * sampling.n * (1 + sampling.prompt_logprobs)
        if wanted > self._settings.max_prompt_logprobs:
            raise RequestError(
                f"echo with logprobs {sampling.prompt_logprobs} asks for {wanted} log-probabilities; at most "
                f"{self._settings.max_prompt_logprobs} fit in one answer: send fewer prompts, or lower logprobs",
                param="logprobs",
                code="too_many_logprobs",
            )

    async def _check_grammar(self, wish: StructuredOutputsParams) -> None:
        if self.tokenizer is None:
            raise RequestError(
                "structured output needs text, and this model has no tokenizer",
                param="structured_outputs",
                code="no_tokenizer",
            )
        await asyncio.get_running_loop().run_in_executor(self._grammar_checks, check_grammar, wish)

    async def _token_id_lists(
        self,
        prompts: list[str] | list[Sequence[int]],
        request: GenerationRequest,
        sampling: SamplingParams,
        info: EngineInfo,
    ) -> Sequence[Sequence[int]]:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        kept = slice(None if sampling.truncate_prompt_tokens is None else -sampling.truncate_prompt_tokens, None)
        if not texts:
            return [prompt[kept] for prompt in prompts if not isinstance(prompt, str)]
        tokenizer = self.text_tokenizer()
        for text in texts:
            fewest = min(len(text) // tokenizer.max_token_chars, sampling.truncate_prompt_tokens or len(text))
            if fewest + sampling.max_tokens > info.max_context_tokens:
                raise _too_long(f"{len(text)} characters, at least {fewest} tokens,", fewest, request, sampling, info)
        token_id_lists = await self.encode(texts, add_special_tokens=request.adds_special_tokens)
        if not all(token_id_lists):
            raise RequestError("prompt is text without a single token", param="prompt", code="empty_prompt")
        return [token_ids[kept] for token_ids in token_id_lists]


async def _pack(token_ids: Sequence[int], vocab_size: int) -> bytes:
    packed: array[int] = array("i")
    for start in range(0, len(token_ids), _IDS_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        part = token_ids[start : start + _IDS_AT_ONCE]
        if isinstance(part, array):
            numbers = np.frombuffer(part, dtype=f"i{part.itemsize}")
            if numbers.min() < 0 or numbers.max() >= vocab_size:
                check_token_ids(part, vocab_size, "prompt")
            packed.frombytes(numbers.astype(np.int32).tobytes())
        else:
            check_token_ids(part, vocab_size, "prompt")
            packed.extend(part)
    return packed.tobytes()


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises: RequestError for ids that the vocabulary lacks, whatever their size."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise RequestError(
            f"{param} holds token id {wrong}; this model's vocabulary is 0 to {vocab_size - 1}",
            param=param,
            code="invalid_token_id",
        )


def _too_long(
    seen: str, tokens: int, request: GenerationRequest, sampling: SamplingParams, info: EngineInfo
) -> RequestTooLongError:
    match request.given_max_tokens:
        case None:
            wanted = f"max_tokens is left out, so {sampling.max_tokens} must fit after it"
        case 0:
            wanted = "max_tokens is 0, for which 1 is computed and not answered"
        case given:
            wanted = f"max_tokens is {given}"
    advice = "shorten the prompt or lower max_tokens" if sampling.max_tokens > 1 else "shorten the prompt"
    return RequestTooLongError(
        f"the prompt has {seen} and {wanted}: {tokens + sampling.max_tokens} tokens, but the limit is "
        f"{info.max_context_tokens}; {advice}"
    )
