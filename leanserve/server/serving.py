"""What every route shares: the engine, the tokenizer, the settings, and what may still come in."""

import asyncio
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from leanserve.contracts.errors import OverloadedError, RequestError, RequestTooLongError
from leanserve.contracts.messages import EngineInfo
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from leanserve.grammars.grammar import check_grammar
from leanserve.server.chat_request import Conversation
from leanserve.server.chat_template import ChatTemplate
from leanserve.server.engine_client import EngineClient
from leanserve.server.errors import NotFoundError
from leanserve.server.generation_request import GenerationRequest
from leanserve.server.messages import Message, template_messages
from leanserve.server.metrics import HttpCounts, Metrics
from leanserve.server.page import Page
from leanserve.server.prompt_encoder import PromptEncoder
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer
from leanserve.server.tool_calls import ToolFormat, find_tool_format

__all__ = ["Prompt", "Serving", "check_token_ids"]

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


class Serving:
    """One model behind one HTTP face. Belongs to the event loop it serves in."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        settings: ServerSettings,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.tool_format: ToolFormat | None = settings.tool_format
        if self.tool_format is None and chat_template is not None:
            self.tool_format = find_tool_format("".join(chat_template.templates.values()))
        self._encoder = None if tokenizer is None else PromptEncoder(tokenizer)
        self.settings = settings
        self.created = int(time.time())
        self.is_draining = False
        self._grammar_checks = ThreadPoolExecutor(2, "grammar check")
        self.page = Page()
        self.counts = HttpCounts()
        self.metrics = Metrics(client, self.counts, self.model_name, compatible=settings.metrics_compat)

    @property
    def model_name(self) -> str:
        return self.settings.model_names[0]

    def check_serving(self) -> None:
        """Raises: OverloadedError while the server loads or drains, EngineError when the engine is gone."""
        if self.is_draining:
            raise OverloadedError("the server is shutting down; try another, or later", retry_after_s=5)
        self.client.engine.check_ready()

    def admit(self, num_prompts: int, num_tokens: int = 0) -> EngineInfo:
        """The engine's facts, if so many prompts, of so many tokens together, may come in now.

        Raises:
            OverloadedError: the server is loading, draining or full.
            EngineError: the engine is gone.
        """
        self.check_serving()
        if self.client.live_requests + num_prompts > self.settings.max_live_requests:
            raise OverloadedError(
                f"{self.client.live_requests} prompts are waiting or running and {num_prompts} more came; "
                f"the limit is {self.settings.max_live_requests}, try again soon"
            )
        queued = self.client.live_prompt_tokens
        if queued and queued + num_tokens > self.settings.max_live_prompt_tokens:
            raise OverloadedError(
                f"prompts of {queued} tokens are waiting or running and {num_tokens} more came; "
                f"the limit is {self.settings.max_live_prompt_tokens}, try again soon"
            )
        info = self.client.engine.info
        assert info is not None
        return info

    def check_model(self, name: str | None) -> None:
        """Raises: NotFoundError for a model that is not served here."""
        if name is not None and name not in self.settings.model_names:
            served = ", ".join(self.settings.model_names)
            raise NotFoundError(
                f"the model {name[:200]!r} is not served here; this server has {served}",
                param="model",
                code="model_not_found",
            )

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
        if len(prompts) * sampling.n > self.settings.max_prompts:
            raise RequestError(
                f"{len(prompts)} prompts with n {sampling.n} ask for {len(prompts) * sampling.n} choices; "
                f"at most {self.settings.max_prompts} fit in one request",
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
        for token_ids in await self._token_id_lists(prompts, request.adds_special_tokens, sampling, info):
            if len(token_ids) + sampling.max_tokens > info.max_context_tokens:
                raise _too_long(f"{len(token_ids)} tokens", len(token_ids), sampling, info)
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

    def _check_logprobs(self, prompts: list[Prompt], sampling: SamplingParams) -> None:
        if sampling.prompt_logprobs is None:
            return
        wanted = sum(prompt.num_tokens for prompt in prompts) * sampling.n * (1 + sampling.prompt_logprobs)
        if wanted > self.settings.max_prompt_logprobs:
            raise RequestError(
                f"echo with logprobs {sampling.prompt_logprobs} asks for {wanted} log-probabilities; at most "
                f"{self.settings.max_prompt_logprobs} fit in one answer: send fewer prompts, or lower logprobs",
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

    async def render(self, messages: list[Message], request: Conversation) -> str:
        """The text of a conversation.

        Raises:
            RequestError: the model has no template or no tokenizer, or cannot take these messages.
        """
        self.text_tokenizer()
        template = self.chat_template
        if template is None:
            raise RequestError(
                "this model has no chat template (its checkpoint has no chat_template.jinja, and its "
                "tokenizer_config.json none either); use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        if request.tools and not template.knows_tools:
            raise RequestError(
                "this model's chat template says nothing of tools; leave them out", param="tools", code="unsupported"
            )
        return await template.render(
            template_messages(messages, knows_developers=template.knows_developers),
            tools=[tool.model_dump(exclude_none=True) for tool in request.tools] if request.tools else None,
            add_generation_prompt=request.prompts_for_more,
            continue_final_message=bool(request.continue_final_message),
            variables=request.chat_template_kwargs,
        )

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> "list[array[int]]":
        """int32 token ids of each text.

        Raises:
            RequestError: the model has no tokenizer.
            OverloadedError: many others wait for theirs.
        """
        self.text_tokenizer()
        assert self._encoder is not None
        return await self._encoder.encode(texts, add_special_tokens=add_special_tokens)

    async def start(self) -> None:
        """Do beforehand what the first request would wait for."""
        if self.chat_template is not None:
            await self.chat_template.start()

    async def close(self) -> None:
        """Let go of what outlives a request."""
        if self.chat_template is not None:
            await self.chat_template.close()
        if self._encoder is not None:
            await self._encoder.close()
        self._grammar_checks.shutdown(wait=False, cancel_futures=True)

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

    async def drain(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Let nobody in, give live requests `grace_s` to finish, or until `hurry`, then end the rest with an error."""
        self.is_draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        while self.client.live_requests and loop.time() < deadline and not hurry.is_set():
            await asyncio.sleep(0.02)
        self.client.end_all("the server is shutting down")

    async def _token_id_lists(
        self,
        prompts: list[str] | list[Sequence[int]],
        add_special_tokens: bool,
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
                raise _too_long(f"{len(text)} characters, at least {fewest} tokens,", fewest, sampling, info)
        token_id_lists = await self.encode(texts, add_special_tokens=add_special_tokens)
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


def _too_long(seen: str, tokens: int, sampling: SamplingParams, info: EngineInfo) -> RequestTooLongError:
    return RequestTooLongError(
        f"the prompt has {seen} and max_tokens is {sampling.max_tokens}: {tokens + sampling.max_tokens} tokens, but "
        f"the limit is {info.max_context_tokens}; shorten the prompt or lower max_tokens"
    )
