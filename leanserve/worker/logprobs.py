"""Log-probabilities of tokens that were chosen or given, with those of the most likely ones.

Shapes: M rows of logits, V vocabulary, k most likely tokens, S prompt tokens to score, L whose hidden state this rank
has, C hidden.
"""

import numpy as np
import torch

from leanserve.contracts.logprobs import Logprobs
from leanserve.distributed.ranks import Ranks
from leanserve.model.activations import SCORED_LOGITS_BYTES
from leanserve.model.decoder import Decoder
from leanserve.worker.inputs import ScoredTokens

__all__ = ["score", "score_prompts", "unpack", "unpack_prompts"]


def score(logits_MV: torch.Tensor, tokens_M: torch.Tensor, num_top: int) -> torch.Tensor:
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


def score_prompts(decoder: Decoder, hidden_NC: torch.Tensor, scored: ScoredTokens, ranks: Ranks) -> torch.Tensor | None:
    """Score the prompt tokens of a step on rank 0, each from the hidden state of the token before it, wherever that is.
    Every rank must call it.

    Returns:
        On rank 0, as `score` for all of them, in the order of `scored.spans`; None on the others.
    """
    mine_LC = hidden_NC.new_zeros((max(scored.tokens_per_rank), hidden_NC.shape[1]))
    mine_LC[: scored.rows_L.shape[0]] = hidden_NC[scored.rows_L]
    hidden_SC = ranks.all_gather(mine_LC)[scored.owners, scored.places]
    chunk_rows = max(1, SCORED_LOGITS_BYTES // (4 * decoder.architecture.vocab_size))
    chunks = []
    for hidden_MC, targets_M in zip(hidden_SC.split(chunk_rows), scored.targets.split(chunk_rows), strict=True):
        logits_MV = decoder.logits(hidden_MC)
        if logits_MV is not None:
            chunks.append(score(logits_MV, targets_M, scored.num_top))
    return torch.cat(chunks) if chunks else None


def unpack_prompts(packed: np.ndarray, spans: list[tuple[int, int, int]]) -> dict[int, Logprobs]:
    """What `score_prompts` gave, by sequence id; `spans` are those of the step's ScoredTokens."""
    found: dict[int, Logprobs] = {}
    start = 0
    for sequence_id, count, num_top in spans:
        found[sequence_id] = unpack(packed[start : start + count], num_top)
        start += count
    return found


def unpack(packed: np.ndarray, num_top: int) -> Logprobs:
    """Rows of `score`, with at most `num_top` of their most likely tokens, as a message carries them."""
    width = (packed.shape[1] - 2) // 2
    kept = min(num_top, width)
    return Logprobs(
        num_top=kept,
        chosen=packed[:, 0].astype(np.float32).tobytes(),
        ranks=packed[:, 1].astype(np.int32).tobytes(),
        top_token_ids=packed[:, 2 : 2 + kept].astype(np.int32).tobytes(),
        top=packed[:, 2 + width : 2 + width + kept].astype(np.float32).tobytes(),
    )
