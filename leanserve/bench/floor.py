"""What a decode step cannot do without reading."""

from leanserve.model.architecture import Architecture

__all__ = ["decode_read_bytes", "kv_bytes"]


def decode_read_bytes(architecture: Architecture, dtype_bytes: int, context_tokens: int, batch: int) -> int:
    """All weights once, but of an embedding that is not also the output matrix only the batch's rows; and the KV."""
    unread = 0 if architecture.tied_embeddings else architecture.vocab_size - batch
    weights = (architecture.num_parameters - unread * architecture.hidden_size) * dtype_bytes
    return weights + kv_bytes(architecture, dtype_bytes, context_tokens, batch)


def kv_bytes(architecture: Architecture, dtype_bytes: int, context_tokens: int, batch: int) -> int:
    """Keys and values of the whole batch."""
    return batch * context_tokens * architecture.kv_bytes_per_token(dtype_bytes)
