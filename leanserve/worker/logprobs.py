"""Log-probabilities of tokens that were chosen or given, with those of the most likely ones.

Shapes: M rows of logits, V vocabulary, k most likely tokens, S prompt tokens to score, L whose hidden state this rank
has, C hidden.
"""

from dataclasses import dataclass

import numpy as np
import torch

from leanserve.contracts.logprobs import Logprobs
from leanserve.distributed.ranks import Ranks
from leanserve.model.activations import SCORED_LOGITS_BYTES
from leanserve.model.decoder import Decoder
from leanserve.worker.inputs import ScoredTokens
from leanserve.worker.sequences import LiveSequence
from leanserve.worker.transfers import Download, upload

__all__ = ["PromptScores", "TokenScores", "score_prompts", "score_tokens"]


@dataclass(frozen=True)
class TokenScores:
    """Of the tokens that a step sampled, on their way to the host."""

    packed: Download
    """As of `_score`."""
    num_top: dict[int, int]
    """By place among the step's tokens, in the order of the rows scored: how many of the most likely are asked for."""

    def wait(self) -> dict[int, Logprobs]:
        """By place among the step's tokens."""
        packed = self.packed.wait().numpy()
        return {m: _unpack(packed[i : i + 1], num_top) for i, (m, num_top) in enumerate(self.num_top.items())}


@dataclass(frozen=True)
class PromptScores:
    """Of the prompt tokens that a step scored, on their way to the host."""

    packed: Download
    """As of `_score`."""
    spans: list[tuple[int, int, int]]
    """As of ScoredTokens."""

    def wait(self) -> dict[int, Logprobs]:
        """By sequence id."""
        packed = self.packed.wait().numpy()
        found: dict[int, Logprobs] = {}
        start = 0
        for sequence_id, count, num_top in self.spans:
            found[sequence_id] = _unpack(packed[start : start + count], num_top)
            start += count
        return found


def score_tokens(logits_MV: torch.Tensor, tokens_M: torch.Tensor, sampled: list[LiveSequence]) -> TokenScores | None:
    """Score the tokens whose requests ask for it. Logits are float32, as the model gave them."""
    num_top = {m: s.sampling.logprobs for m, s in enumerate(sampled) if s.sampling.logprobs is not None}
    if not num_top:
        return None
    rows = upload(np.array(list(num_top)), logits_MV.device)
    return TokenScores(Download(_score(logits_MV[rows], tokens_M[rows], max(num_top.values()))), num_top)


def score_prompts(decoder: Decoder, hidden_NC: torch.Tensor, scored: ScoredTokens, ranks: Ranks) -> PromptScores | None:
    """Score the prompt tokens of a step on rank 0, each from the hidden state of the token before it, wherever that is.
    Every rank must call it.

    Returns:
        None on the others.
    """
    mine_LC = hidden_NC.new_zeros((max(scored.tokens_per_rank), hidden_NC.shape[1]))
    mine_LC[: scored.rows_L.shape[0]] = hidden_NC[scored.rows_L]
    hidden_SC = ranks.all_gather(mine_LC)[scored.owners, scored.places]
    chunk_rows = max(1, SCORED_LOGITS_BYTES // (4 * decoder.architecture.vocab_size))
    chunks = []
    for hidden_MC, targets_M in zip(hidden_SC.split(chunk_rows), scored.targets.split(chunk_rows), strict=True):
        logits_MV = decoder.logits(hidden_MC)
        if logits_MV is not None:
            chunks.append(_score(logits_MV, targets_M, scored.num_top))
    return PromptScores(Download(torch.cat(chunks)), scored.spans) if chunks else None


def _score(logits_MV: torch.Tensor, tokens_M: torch.Tensor, num_top: int) -> torch.Tensor:
    """Of each row: its token's log-probability, that token's rank (1 is the most likely), the ids of the `num_top` most
    likely tokens, and their log-probabilities.

    Args:
        logits_MV: float32, as the model gave them.

    Returns:
        float64 [M, 2 + 2 * num_top] (which holds ids and ranks exactly).
    """
    logprobs_MV = torch.log_softmax(logits_MV, dim=-1)
    chosen_M1 = logprobs_MV.gather(1, tokens_M.unsqueeze(1))
    ranks_M1 = (logprobs_MV > chosen_M1).sum(dim=-1, keepdim=True) + 1
    top_Mk, ids_Mk = logprobs_MV.topk(min(num_top, logits_MV.shape[1]), dim=-1)
    return torch.cat([column.double() for column in (chosen_M1, ranks_M1, ids_Mk, top_Mk)], dim=-1)


def _unpack(packed: np.ndarray, num_top: int) -> Logprobs:
    """Rows of `_score`, with at most `num_top` of their most likely tokens, as a message carries them."""
    width = (packed.shape[1] - 2) // 2
    kept = min(num_top, width)
    return Logprobs(
        num_top=kept,
        chosen=packed[:, 0].astype(np.float32).tobytes(),
        ranks=packed[:, 1].astype(np.int32).tobytes(),
        top_token_ids=packed[:, 2 : 2 + kept].astype(np.int32).tobytes(),
        top=packed[:, 2 + width : 2 + width + kept].astype(np.float32).tobytes(),
    )
