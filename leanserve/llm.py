"""The offline face: a model on any number of ranks, called from Python. This process needs no torch.

from leanserve import LLM, SamplingParams

with LLM("path/to/model", ranks=2) as llm:
    for result in llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=32)):
        print(result.outputs[0].text)
"""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from leanserve.contracts.errors import EngineError, RequestError, RequestTooLongError
from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.messages import EngineInfo, PrefillProgress
from leanserve.contracts.sampling import SamplingParams
from leanserve.grammars.grammar import check_grammar
from leanserve.launch.engine_group import EngineGroup
from leanserve.launch.options import LaunchOptions
from leanserve.launch.run_dir import make_run_dir
from leanserve.outputs import CompletionOutput, Delta, Logprob, RequestOutput, logprobs_by_id
from leanserve.server.current_engine import EngineLoad
from leanserve.server.detokenizer import TextStream
from leanserve.server.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "Logprob", "Prompt", "RequestOutput"]

Prompt = str | Mapping[str, Sequence[int]]
"""Text, or {"prompt_token_ids": [...]}."""


class LLM:
    """A model on ranks of its own, started here and ended by `close()` (or at the end of a `with` block).

    Args:
        model: a checkpoint directory or a hub id; None is the bundled model.
        options: keywords of `LaunchOptions`: ranks, dtype, device, comm, attention, enforce_eager, weights,
            page_tokens, kv_memory, max_context_tokens, prefix_cache, max_batch_tokens, max_sequences,
            long_prefill_tokens.

    Raises:
        ConfigError, ModelError: an option or the checkpoint is wrong.
        EngineError: the ranks could not start.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        try:
            launch = LaunchOptions(model=None if model is None else str(model), **options)
        except TypeError:
            allowed = [name for name in LaunchOptions.__dataclass_fields__ if name != "model"]
            unknown = sorted(set(options) - set(allowed))
            raise TypeError(f"LLM has no option {', '.join(unknown)}; options are {', '.join(allowed)}") from None
        model_dir = launch.find_model()
        num_ranks, _ = launch.count_ranks()
        config = launch.engine_config(model_dir)
        self._tokenizer = Tokenizer.from_dir(model_dir)
        self._group = EngineGroup(config, num_ranks=num_ranks, run_dir=make_run_dir())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="leanserve", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self.info: EngineInfo = self._run(self._start()).result()
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all at once; results come in the order of the prompts.

        Args:
            prompts: one or many; a string, or `{"prompt_token_ids": [...]}`.
            sampling_params: one for all, or one per prompt; None is the default `SamplingParams()`.
            use_tqdm: draw a progress bar on a terminal when there are several prompts.

        Raises:
            RequestError: a prompt cannot be served; nothing was generated.
            EngineError: the engine failed.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params_for(many, sampling_params)
        checked = [self._check(prompt, sampling) for prompt, sampling in zip(many, params, strict=True)]
        results = [
            RequestOutput(prompt if isinstance(prompt, str) else None, token_ids, [])
            for prompt, token_ids in zip(many, checked, strict=True)
        ]
        with self._progress(sum(sampling.n for sampling in params), enabled=use_tqdm) as advance:
            pending = [
                (result, self._run(self._complete(result.prompt_token_ids, sample, index, advance)))
                for result, sampling in zip(results, params, strict=True)
                for index, sample in enumerate(sampling.samples())
            ]
            try:
                for result, future in pending:
                    output, result.prompt_logprobs = future.result()
                    result.outputs.append(output)
            except BaseException:
                for _, future in pending:
                    future.cancel()
                raise
        return results

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        on_progress: Callable[[PrefillProgress], None] | None = None,
    ) -> Iterator[Delta]:
        """Complete one prompt, piece by piece as it is generated. Leaving the loop early stops the request.

        `on_progress` is called, in another thread, whenever more of a long prompt is computed.

        Raises:
            RequestError: the prompt cannot be served, or `n` is not 1.
        """
        sampling = sampling_params or SamplingParams()
        if sampling.n != 1:
            raise RequestError(f"n is {sampling.n}; a stream is one completion", param="n")
        token_ids = self._check(prompt, sampling)
        queue: SimpleQueue[Delta | BaseException | None] = SimpleQueue()

        async def pump() -> None:
            try:
                async for delta in self._deltas(token_ids, sampling, on_progress):
                    queue.put(delta)
                queue.put(None)
            except BaseException as error:
                queue.put(error)
                raise

        pumping = self._run(pump())
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            pumping.cancel()

    @property
    def load(self) -> EngineLoad:
        """What the engine said of itself with its newest step: running, waiting, pages used per rank."""
        return self._group.client.engine.load

    def close(self) -> None:
        """End the ranks and free what they held. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._run(self._group.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not sys.is_finalizing():
            with suppress(Exception):
                self.close()

    def _run(self, coroutine: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _start(self) -> EngineInfo:
        await self._group.start()
        return await self._group.wait_ready()

    def _params_for(
        self, prompts: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or SamplingParams()] * len(prompts)
        if len(given) != len(prompts):
            raise RequestError(f"{len(given)} sampling params for {len(prompts)} prompts; give one, or one per prompt")
        return list(given)

    def _check(self, prompt: Prompt, sampling: SamplingParams) -> list[int]:
        """Token ids of a prompt that can be served."""
        if self._closed:
            raise EngineError("this LLM is closed")
        if isinstance(prompt, str):
            token_ids = self._require_tokenizer("a text prompt").encode(prompt)
        else:
            if set(prompt) != {"prompt_token_ids"}:
                raise RequestError(
                    f'a prompt is a string or {{"prompt_token_ids": [...]}}, not a dict of {list(prompt)}'
                )
            token_ids = [int(token_id) for token_id in prompt["prompt_token_ids"]]
        if not token_ids:
            raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
        outside = next((t for t in token_ids if not 0 <= t < self.info.vocab_size), None)
        if outside is not None:
            raise RequestError(
                f"token id {outside} is outside the vocabulary of {self.info.vocab_size}", param="prompt"
            )
        if sampling.truncate_prompt_tokens is not None:
            token_ids = token_ids[-sampling.truncate_prompt_tokens :]
        if sampling.stop:
            self._require_tokenizer("stop strings")
        if sampling.structured_outputs is not None:
            self._require_tokenizer("structured output")
            check_grammar(sampling.structured_outputs)
        for param in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            ids = getattr(sampling, param)
            if ids and max(ids) >= self.info.vocab_size:
                raise RequestError(
                    f"{param} holds token id {max(ids)}, outside the vocabulary of {self.info.vocab_size}", param=param
                )
        total = len(token_ids) + sampling.max_tokens
        if total > self.info.max_context_tokens:
            raise RequestTooLongError(
                f"prompt of {len(token_ids)} tokens + max_tokens of {sampling.max_tokens} = {total}, above the limit "
                f"of {self.info.max_context_tokens}"
            )
        return token_ids

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(
                f'{what} needs a tokenizer, and the checkpoint has none; give {{"prompt_token_ids": [...]}}',
                param="prompt",
            )
        return self._tokenizer

    async def _deltas(
        self,
        token_ids: list[int],
        sampling: SamplingParams,
        on_progress: Callable[[PrefillProgress], None] | None = None,
    ) -> AsyncIterator[Delta]:
        text = None
        if self._tokenizer is not None:
            text = TextStream(self._tokenizer, stop=sampling.stop, min_tokens=sampling.min_tokens)
        async for output in self._group.client.generate(token_ids, sampling, on_progress=on_progress):
            new_text, stopped = ("", False) if text is None else text.push(output.token_ids)
            if stopped:
                yield Delta(new_text, output.token_ids, "stop", output.logprobs, output.prompt_logprobs)
                return
            if output.finish_reason is not None and text is not None:
                new_text += text.finish()
            yield Delta(new_text, output.token_ids, output.finish_reason, output.logprobs, output.prompt_logprobs)

    async def _complete(
        self, token_ids: list[int], sampling: SamplingParams, index: int, advance: Any
    ) -> tuple[CompletionOutput, list[dict[int, Logprob] | None] | None]:
        """A completion, and its prompt's log-probabilities where they are asked for."""
        output = CompletionOutput(token_ids=[], text="", finish_reason="", index=index)
        output.logprobs = None if sampling.logprobs is None else []
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None if sampling.prompt_logprobs is None else [None]
        async for delta in self._deltas(token_ids, sampling):
            output.token_ids += delta.token_ids
            output.text += delta.text
            output.finish_reason = delta.finish_reason or ""
            if output.logprobs is not None and delta.logprobs is not None:
                output.logprobs += self._by_id(delta.token_ids, delta.logprobs)
            if prompt_logprobs is not None and delta.prompt_logprobs is not None:
                first = len(prompt_logprobs)
                prompt_logprobs += self._by_id(token_ids[first:], delta.prompt_logprobs)
        advance()
        return output, prompt_logprobs

    def _by_id(self, token_ids: Sequence[int], logprobs: Logprobs) -> list[dict[int, Logprob]]:
        decode = None if self._tokenizer is None else partial(self._tokenizer.decode, skip_special_tokens=False)
        return logprobs_by_id(token_ids, logprobs, decode)

    def _progress(self, total: int, *, enabled: bool) -> "_ProgressBar":
        return _ProgressBar(total, enabled=enabled and total > 1)


class _ProgressBar:
    """Finished prompts, on a terminal."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not (enabled and console.is_terminal)
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
