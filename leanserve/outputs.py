"""What the offline face returns: prompts with their completions, and log-probabilities by token id, as in vLLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.sampling import FinishReason

__all__ = ["CompletionOutput", "Delta", "Logprob", "RequestOutput", "logprobs_by_id"]


@dataclass(frozen=True)
class Logprob:
    """A token's natural log-probability by the model alone, and its rank: 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str | None
    """None where the checkpoint has no tokenizer files."""


@dataclass
class CompletionOutput:
    """One completion."""

    token_ids: list[int]
    text: str
    """Empty where the checkpoint has no tokenizer files."""
    finish_reason: FinishReason
    index: int = 0
    logprobs: list[dict[int, Logprob]] | None = None
    """With `SamplingParams.logprobs`: for each token, itself and the most likely ones by id."""


@dataclass
class RequestOutput:
    """One prompt and what was generated from it."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """`SamplingParams.n` of them."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """With `SamplingParams.prompt_logprobs`: for each prompt token, like those of outputs; None for the first."""


@dataclass(frozen=True)
class Delta:
    """A piece of a running completion."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


def logprobs_by_id(
    token_ids: Sequence[int], logprobs: Logprobs, decode: Callable[[Sequence[int]], str] | None
) -> list[dict[int, Logprob]]:
    """For each token, the token itself, then the most likely ones.

    Args:
        decode: gives the text of token ids; None where the checkpoint has no tokenizer files.
    """
    found: list[dict[int, Logprob]] = []
    for token_id, row in zip(token_ids, logprobs.rows(), strict=False):
        entries = {token_id: (row.logprob, row.rank)}
        for rank, (top_id, logprob) in enumerate(row.top, 1):
            entries.setdefault(top_id, (logprob, rank))
        found.append(
            {
                entry_id: Logprob(logprob, rank, None if decode is None else decode([entry_id]))
                for entry_id, (logprob, rank) in entries.items()
            }
        )
    return found
