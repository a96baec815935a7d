"""The answers of /v1/completions, in the shape that OpenAI's clients read."""

from array import array
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.messages import TokenOutput
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.answer import Answer
from leanserve.server.choices import Choice, Piece, make_choices
from leanserve.server.completion_request import CompletionRequest
from leanserve.server.legacy_logprobs import LegacyLogprobs
from leanserve.server.prompt_intake import Prompt
from leanserve.server.token_texts import TokenTexts
from leanserve.server.tokenizer import Tokenizer

__all__ = ["Completion"]


class Completion(Answer):
    """One answer of /v1/completions."""

    operation = "text_completion"

    def __init__(
        self,
        request: CompletionRequest,
        prompts: list[Prompt],
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        model_name: str,
        page_tokens: int,
    ) -> None:
        answer_id = f"cmpl-{uuid4().hex}"
        super().__init__(
            answer_id,
            request,
            make_choices(answer_id, request, prompts, sampling, tokenizer),
            model_name,
            chunk_object="text_completion",
            whole_object="text_completion",
        )
        self._returns_token_ids = bool(request.return_token_ids)
        self._returns_page_owners = bool(request.return_page_owners)
        self._page_tokens = page_tokens
        self._told_owners: set[int] = set()
        self._echoes = bool(request.echo)
        self._generates = request.generates
        self._echoed: set[int] = set()
        self._logprobs: dict[int, LegacyLogprobs] = {}
        if request.logprobs is not None:
            texts = TokenTexts(tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
            shows_special = request.skip_special_tokens is False
            self._logprobs = {
                choice.index: LegacyLogprobs(texts, shows_special=shows_special) for choice in self.choices.values()
            }
        self._by_index = {choice.index: choice for choice in self.choices.values()}

    def pieces(self, choice: Choice, output: TokenOutput) -> Iterator[Piece]:
        pieces = super().pieces(choice, output)
        return self._after_the_prompt(choice, pieces) if self._echoes else pieces

    def _after_the_prompt(self, choice: Choice, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if piece.index not in self._echoed:
                self._echoed.add(piece.index)
                text = choice.prompt.text or ""
                if not self._generates:
                    choice.num_tokens = 0
                    yield Piece(piece.index, text, [], "length", None, is_prompt=True)
                    return
                yield Piece(piece.index, text, [], None, None, is_prompt=True)
            yield piece

    def choice_object(self, piece: Piece) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs_object(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._returns_token_ids:
            choice["token_ids"] = piece.token_ids
        page_owners = self._by_index[piece.index].page_owners
        if self._returns_page_owners and page_owners and piece.index not in self._told_owners:
            self._told_owners.add(piece.index)
            choice["page_owners"] = {"page_tokens": self._page_tokens, "ranks": array("H", page_owners).tolist()}
        return choice

    def _logprobs_object(self, piece: Piece) -> dict[str, list[Any]] | None:
        """Of the tokens in a piece, the prompt's first where they are in it."""
        writer = self._logprobs.get(piece.index)
        if writer is None:
            return None
        parts: list[dict[str, list[Any]]] = []
        if piece.is_prompt or (self._echoes and not self.streams):
            choice = self._by_index[piece.index]
            logprobs = Logprobs.join(choice.prompt_logprobs) if choice.prompt_logprobs else None
            parts.append(writer.prompt(choice.prompt.ids(), logprobs, choice.prompt.text or ""))
        if piece.logprobs is not None:
            parts.append(writer.part(piece.token_ids, piece.logprobs))
        if not parts:
            return None
        return {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
