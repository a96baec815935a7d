"""What a step takes beside weights and KV. No torch: the planner counts with it too."""

from leanserve.contracts.config import BatchOptions
from leanserve.model.architecture import Architecture

__all__ = ["activation_bytes"]


def activation_bytes(architecture: Architecture, batch: BatchOptions, dtype_bytes: int) -> int:
    """Of one full step: the widest layer's activations, its float32 attention states from all ranks, and logits."""
    widest = 2 * architecture.intermediate_size + 4 * architecture.hidden_size
    states = architecture.num_heads * (architecture.head_dim + 1) * 4 * 3
    logits = batch.max_sequences * architecture.vocab_size * 4 * 2
    return batch.max_batch_tokens * (widest * dtype_bytes * 2 + states) + logits
