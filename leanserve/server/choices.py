"""From tokens to the pieces of a choice: what every generation route has in common. Knows no route's JSON."""

from collections.abc import Iterator

import msgspec

from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.messages import TokenOutput
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.detokenizer import TextStream
from leanserve.server.generation_request import GenerationRequest
from leanserve.server.prompt_intake import Prompt
from leanserve.server.tokenizer import Tokenizer

__all__ = ["Choice", "Piece", "make_choices"]


class Piece(msgspec.Struct, frozen=True):
    """What one token adds to a choice. One is made for every token; a frozen dataclass takes a microsecond more."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    """The stop string, or the requested stop token, that ended the choice."""
    logprobs: Logprobs | None = None
    """Of token_ids, where they were asked for."""
    is_prompt: bool = False
    """Not generated: the prompt itself, for a client that wants it back; `Choice.prompt_logprobs` has its own."""


class Choice:
    """One completion of one prompt while it grows."""

    def __init__(
        self, index: int, request_id: str, prompt: Prompt, sampling: SamplingParams, text_stream: TextStream | None
    ):
        self.index = index
        self.request_id = request_id
        self.prompt = prompt
        self.sampling = sampling
        """What the engine is asked for: one completion."""
        self.num_tokens = 0
        self.cached_tokens = 0
        """Prompt tokens that the engine's prefix cache held."""
        self.page_owners = b""
        """`TokenOutput.page_owners`, known when the first piece comes."""
        self.prompt_logprobs: list[Logprobs] = []
        """Of the prompt's tokens from the second on, in order; complete when the first piece comes."""
        self.finish_reason: str | None = None
        self._text_stream = text_stream

    def pieces(self, output: TokenOutput) -> Iterator[Piece]:
        """One piece a token; the last one carries the finish_reason. What follows a stop string is dropped."""
        self.cached_tokens += output.cached_tokens
        self.page_owners = self.page_owners or output.page_owners
        if output.prompt_logprobs is not None:
            self.prompt_logprobs.append(output.prompt_logprobs)
        last = len(output.token_ids) - 1
        for place, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            logprobs = output.logprobs and output.logprobs.row(place)
            text, stopped = self._text_stream.push((token_id,)) if self._text_stream is not None else ("", False)
            if stopped:
                self.finish_reason = "stop"
                assert self._text_stream is not None
                yield Piece(self.index, text, [token_id], "stop", self._text_stream.stop_string, logprobs)
                return
            if place == last and output.finish_reason is not None:
                yield self._last_piece(text, [token_id], output, logprobs)
                return
            yield Piece(self.index, text, [token_id], None, None, logprobs)
        if output.finish_reason is not None:  # it ended without another token
            yield self._last_piece("", [], output, None)

    def _last_piece(self, text: str, token_ids: list[int], output: TokenOutput, logprobs: Logprobs | None) -> Piece:
        self.finish_reason = output.finish_reason
        stop_reason: str | int | None = None
        if self._text_stream is not None:
            text += self._text_stream.finish()
            stop_reason = self._text_stream.stop_string
        if stop_reason is not None:  # the held text completed it
            self.finish_reason = "stop"
        elif output.stop_token_id in self.sampling.stop_token_ids:
            stop_reason = output.stop_token_id
        return Piece(self.index, text, token_ids, self.finish_reason, stop_reason, logprobs)


def make_choices(
    answer_id: str,
    request: GenerationRequest,
    prompts: list[Prompt],
    sampling: SamplingParams,
    tokenizer: Tokenizer | None,
) -> dict[str, Choice]:
    """All choices of an answer by the request id that each has at the engine.

    n of them for each prompt: the index is prompt * n + sample. `SamplingParams.samples` gives each its own seed.
    """
    choices: dict[str, Choice] = {}
    for prompt in prompts:
        for sample in sampling.samples():
            text_stream = tokenizer and TextStream(
                tokenizer,
                sampling.stop,
                prompt.last_token_ids,
                skip_special_tokens=request.skip_special_tokens is not False,
                include_stop=bool(request.include_stop_str_in_output),
                min_tokens=sampling.min_tokens,
            )
            index = len(choices)
            choices[f"{answer_id}-{index}"] = Choice(index, f"{answer_id}-{index}", prompt, sample, text_stream)
    return choices
