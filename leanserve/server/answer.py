"""One answer of a generation route, whole or chunk by chunk: its choices, its token counts, its envelope."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar

from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.messages import TokenOutput
from leanserve.server.choices import Choice, Piece
from leanserve.server.generation_request import GenerationRequest
from leanserve.server.output_stream import OutputStream

__all__ = ["Answer"]


class Answer(ABC):
    """What /v1/completions and /v1/chat/completions share. A route's class says how one choice is written.

    Args:
        answer_id: unique; choices are known to the engine by it.
        chunk_object, whole_object: OpenAI's names of the two shapes.
        choices: by request id.
    """

    operation: ClassVar[str]
    """What OpenTelemetry calls it."""

    def __init__(
        self,
        answer_id: str,
        request: GenerationRequest,
        choices: dict[str, Choice],
        model_name: str,
        *,
        chunk_object: str,
        whole_object: str,
    ) -> None:
        self.id = answer_id
        self.choices = choices
        self.model_name = model_name
        self.streams = bool(request.stream)
        object_name = chunk_object if self.streams else whole_object
        self._envelope = {"id": self.id, "object": object_name, "created": int(time.time()), "model": model_name}
        prompts = {id(choice.prompt): choice.prompt for choice in choices.values()}
        self.prompt_tokens = sum(prompt.num_tokens for prompt in prompts.values())
        options = request.stream_options
        self.includes_usage = bool(options and options.include_usage)
        self.tells_progress = bool(request.return_progress)
        self._continuous_usage = bool(options and options.include_usage and options.continuous_usage_stats)

    @abstractmethod
    def choice_object(self, piece: Piece) -> dict[str, object]:
        """One entry of `choices`: of a stream's chunk for a piece of it, else of the whole answer."""

    def pieces(self, choice: Choice, output: TokenOutput) -> Iterator[Piece]:
        """What an output adds to its choice."""
        return choice.pieces(output)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices.values())

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache held. A prompt's samples share it: what its first one found counts."""
        cached: dict[int, int] = {}
        for choice in self.choices.values():
            cached.setdefault(id(choice.prompt), choice.cached_tokens)
        return sum(cached.values())

    def progress(self, outputs: OutputStream) -> dict[str, int]:
        """How far all prompts together are: tokens in all, found in the cache, and in the KV cache by now."""
        total = cached = processed = 0
        for choice in self.choices.values():
            now = outputs.progress.get(choice.request_id)
            if now is not None:
                total += now.total_tokens
                cached += now.cached_tokens
                processed += now.processed_tokens
            else:  # not begun, or done
                total += choice.prompt.num_tokens
                cached += choice.cached_tokens
                processed += choice.prompt.num_tokens if choice.num_tokens else 0
        return {"total": total, "cached": cached, "processed": processed}

    def usage(self) -> dict[str, object]:
        completion_tokens = self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def chunk(self, piece: Piece) -> dict[str, object]:
        """The stream's object for one piece."""
        chunk: dict[str, object] = {**self._envelope, "choices": [self.choice_object(piece)]}
        if self._continuous_usage:
            chunk["usage"] = self.usage()
        elif self.includes_usage:
            chunk["usage"] = None
        return chunk

    def progress_chunk(self, progress: dict[str, int], time_ms: float) -> dict[str, object]:
        return {**self._envelope, "choices": [], "prompt_progress": {**progress, "time_ms": round(time_ms, 1)}}

    def usage_chunk(self) -> dict[str, object]:
        return {**self._envelope, "choices": [], "usage": self.usage()}

    def whole(self, pieces: list[Piece]) -> dict[str, object]:
        """The answer that is not streamed, from all pieces of all choices."""
        by_index: dict[int, list[Piece]] = {choice.index: [] for choice in self.choices.values()}
        for piece in pieces:
            by_index[piece.index].append(piece)
        choices = [self.choice_object(_joined(parts)) for parts in by_index.values()]
        return {**self._envelope, "choices": choices, "usage": self.usage()}

    async def read(self, outputs: OutputStream, keep_alive_s: float | None = None) -> AsyncIterator[Piece | None]:
        """All pieces of all choices as they come; None after each `keep_alive_s` of silence."""
        while not outputs.finished:
            output = await outputs.next(keep_alive_s)
            if output is None:
                yield None
                continue
            choice = self.choices[output.request_id]
            for piece in self.pieces(choice, output):
                yield piece
            if choice.finish_reason is not None:
                outputs.abort(choice.request_id, reason=choice.finish_reason)


def _joined(pieces: list[Piece]) -> Piece:
    """All pieces of one choice as one."""
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return Piece(
        pieces[0].index,
        "".join([piece.text for piece in pieces]),
        [token_id for piece in pieces for token_id in piece.token_ids],
        pieces[-1].finish_reason,
        pieces[-1].stop_reason,
        Logprobs.join(logprobs) if logprobs else None,
    )
