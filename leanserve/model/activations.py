"""What a step takes beside weights and KV. No torch: the planner counts with it too."""

from leanserve.contracts.config import BatchOptions
from leanserve.model.architecture import Architecture

__all__ = ["SCORED_LOGITS_BYTES", "activation_bytes"]

SCORED_LOGITS_BYTES = 64 << 20
"""Float32 logits of prompt tokens at once: what bounds the memory of scoring a prompt."""


def activation_bytes(
    architecture: Architecture, batch: BatchOptions, dtype_bytes: int, *, page_tokens: int, captures_graphs: bool
) -> int:
    """Of one full step: the widest layer's activations, its float32 attention states from all ranks, and logits
    of the tokens to sample or of prompt tokens to score; page tables of all sequences, at the model's longest; and what
    captured decode steps keep for themselves."""
    widest = 2 * architecture.intermediate_size + 4 * architecture.hidden_size
    states = architecture.num_heads * (architecture.head_dim + 1) * 4 * 3
    token_bytes = widest * dtype_bytes * 2 + states
    logits = batch.max_sequences * architecture.vocab_size * 4 * 2
    scoring = 4 * SCORED_LOGITS_BYTES  # the logits, their log-softmax, and what topk needs
    page_tables = batch.max_sequences * -(-architecture.max_context_tokens // page_tokens) * 4 * 2
    graphs = batch.max_sequences * token_bytes + logits if captures_graphs else 0
    return batch.longest_step_tokens * token_bytes + max(logits, scoring) + page_tables + graphs
