"""Bytes of a model: its weights by kind, and what one rank keeps of them.

The kinds are those that `--weights` splits: attention projections, MLP, vocabulary (embedding and output projection).
The rest every rank has whole.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from leanserve.model.architecture import Architecture

__all__ = ["DTYPE_BYTES", "WEIGHT_SPLITS", "WeightBytes", "WeightSplit", "weight_bytes"]

WeightSplit = Literal["replicated", "mlp", "all"]
WEIGHT_SPLITS: tuple[WeightSplit, ...] = get_args(WeightSplit)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights by kind, of the whole model or of one rank."""

    attention: float
    mlp: float
    vocabulary: float
    rest: float

    @property
    def total(self) -> float:
        return self.attention + self.mlp + self.vocabulary + self.rest

    def on_one_of(self, ranks: int, split: WeightSplit) -> "WeightBytes":
        """What one of `ranks` ranks holds; shares are taken as equal, though they may differ by a row."""
        mlp_share = 1 if split == "replicated" else ranks
        attention_share = ranks if split == "all" else 1
        return WeightBytes(
            self.attention / attention_share, self.mlp / mlp_share, self.vocabulary / mlp_share, self.rest
        )

    def read_per_step(self, architecture: Architecture) -> float:
        """Bytes that a decode step reads: all but the embedding, of which it reads a row a token; tied weights are the
        output projection too."""
        return self.total - (0 if architecture.tied_embeddings else self.vocabulary / 2)


def weight_bytes(architecture: Architecture, dtype_bytes: int) -> WeightBytes:
    """Bytes of a model's weights as every rank would hold them without any split."""
    kinds = {"attention": 0, "mlp": 0, "vocabulary": 0, "rest": 0}
    for name, shape in architecture.tensor_shapes().items():
        if "_proj." in name:
            kind = "attention" if ".self_attn." in name else "mlp"
        else:
            kind = "vocabulary" if name in ("model.embed_tokens.weight", "lm_head.weight") else "rest"
        kinds[kind] += prod(shape) * dtype_bytes
    return WeightBytes(**kinds)
