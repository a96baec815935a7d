"""The answers of /v1/completions, in the shape that OpenAI's clients read."""

from uuid import uuid4

from leanserve.contracts.sampling import SamplingParams
from leanserve.server.answer import Answer
from leanserve.server.choices import Piece, make_choices
from leanserve.server.completion_request import CompletionRequest
from leanserve.server.serving import Prompt
from leanserve.server.tokenizer import Tokenizer

__all__ = ["Completion"]


class Completion(Answer):
    """One answer of /v1/completions."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: list[Prompt],
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        model_name: str,
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

    def choice_object(self, piece: Piece) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._returns_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice
