"""From tokens to the choices of a text completion, whole or chunk by chunk."""

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from uuid import uuid4

from leanserve.contracts.messages import TokenOutput
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.detokenizer import TextStream
from leanserve.server.protocol import CompletionRequest
from leanserve.server.serving import Prompt
from leanserve.server.tokenizer import Tokenizer

__all__ = ["Choice", "Completion", "Piece"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to a choice."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    """The stop string, or the requested stop token, that ended the choice."""
    page_owners: bytes = b""
    """With the first token: `TokenOutput.page_owners`."""


class Choice:
    """One prompt's completion while it grows."""

    def __init__(self, index: int, request_id: str, text_stream: TextStream | None, stop_token_ids: tuple[int, ...]):
        self.index = index
        self.request_id = request_id
        self.num_tokens = 0
        self.cached_tokens = 0
        """Prompt tokens that the engine's prefix cache held."""
        self.finish_reason: str | None = None
        self._text_stream = text_stream
        self._stop_token_ids = stop_token_ids

    def pieces(self, output: TokenOutput) -> Iterator[Piece]:
        """One piece a token; the last one carries the finish_reason. What follows a stop string is dropped."""
        page_owners = output.page_owners
        for piece in self._pieces(output):
            yield replace(piece, page_owners=page_owners) if page_owners else piece
            page_owners = b""

    def _pieces(self, output: TokenOutput) -> Iterator[Piece]:
        self.cached_tokens += output.cached_tokens
        last = len(output.token_ids) - 1
        for place, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            text, stopped = self._text_stream.push((token_id,)) if self._text_stream is not None else ("", False)
            if stopped:
                self.finish_reason = "stop"
                assert self._text_stream is not None
                yield Piece(self.index, text, [token_id], "stop", self._text_stream.stop_string)
                return
            if place == last and output.finish_reason is not None:
                yield self._last_piece(text, [token_id], output)
                return
            yield Piece(self.index, text, [token_id], None, None)
        if output.finish_reason is not None:  # it ended without another token
            yield self._last_piece("", [], output)

    def _last_piece(self, text: str, token_ids: list[int], output: TokenOutput) -> Piece:
        self.finish_reason = output.finish_reason
        stop_reason: str | int | None = None
        if self._text_stream is not None:
            text += self._text_stream.finish()
            stop_reason = self._text_stream.stop_string
        if stop_reason is not None:  # the held text completed it
            self.finish_reason = "stop"
        elif output.stop_token_id in self._stop_token_ids:
            stop_reason = output.stop_token_id
        return Piece(self.index, text, token_ids, self.finish_reason, stop_reason)


class Completion:
    """One answer of /v1/completions: its choices, and the objects that OpenAI's clients read."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: list[Prompt],
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        model_name: str,
        page_tokens: int,
    ) -> None:
        self.id = f"cmpl-{uuid4().hex}"
        self.choices = {
            choice.request_id: choice for choice in self._make_choices(request, prompts, sampling, tokenizer)
        }
        self._envelope = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": model_name}
        self._prompt_tokens = sum(prompt.num_tokens for prompt in prompts)
        self._returns_token_ids = bool(request.return_token_ids)
        self._returns_page_owners = bool(request.return_page_owners)
        self._page_tokens = page_tokens
        options = request.stream_options
        self.includes_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.include_usage and options.continuous_usage_stats)

    def _make_choices(
        self,
        request: CompletionRequest,
        prompts: list[Prompt],
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> Iterator[Choice]:
        for index, prompt in enumerate(prompts):
            text_stream = tokenizer and TextStream(
                tokenizer,
                sampling.stop,
                prompt.last_token_ids,
                skip_special_tokens=request.skip_special_tokens is not False,
                include_stop=bool(request.include_stop_str_in_output),
            )
            yield Choice(index, f"{self.id}-{index}", text_stream, sampling.stop_token_ids)

    def usage(self) -> dict[str, object]:
        completion_tokens = sum(choice.num_tokens for choice in self.choices.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in self.choices.values())},
        }

    def chunk(self, piece: Piece) -> dict[str, object]:
        """The stream's object for one token."""
        chunk: dict[str, object] = {**self._envelope, "choices": [self._choice(piece)]}
        if self._continuous_usage:
            chunk["usage"] = self.usage()
        elif self.includes_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self) -> dict[str, object]:
        return {**self._envelope, "choices": [], "usage": self.usage()}

    def whole(self, pieces: list[Piece]) -> dict[str, object]:
        """The answer that is not streamed, from all pieces of all choices."""
        by_index: dict[int, list[Piece]] = {choice.index: [] for choice in self.choices.values()}
        for piece in pieces:
            by_index[piece.index].append(piece)
        choices = [
            self._choice(
                Piece(
                    index,
                    "".join([piece.text for piece in parts]),
                    [token_id for piece in parts for token_id in piece.token_ids],
                    parts[-1].finish_reason,
                    parts[-1].stop_reason,
                    parts[0].page_owners,
                )
            )
            for index, parts in by_index.items()
        ]
        return {**self._envelope, "choices": choices, "usage": self.usage()}

    def _choice(self, piece: Piece) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._returns_token_ids:
            choice["token_ids"] = piece.token_ids
        if self._returns_page_owners and piece.page_owners:
            ranks = array("H", piece.page_owners).tolist()
            choice["page_owners"] = {"page_tokens": self._page_tokens, "ranks": ranks}
        return choice
