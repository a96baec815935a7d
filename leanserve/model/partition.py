"""Which part of every weight one rank holds. No torch here.

Matrices are cut into even shares; nothing has to divide, and a share may be empty.
Two matrices that follow each other are cut along the dimension between them (Shoeybi et al., Megatron-LM, 2019): the
first by outputs, the second by inputs, so that a rank's products need its own share alone and the ranks' results add
up. The query, key and value projections are one matrix here, cut without regard to heads.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal, get_args

from leanserve.contracts.errors import ConfigError
from leanserve.model.architecture import Architecture

__all__ = ["WEIGHT_SPLITS", "Partition", "WeightSplit", "even_shares"]

WeightSplit = Literal["replicated", "mlp", "all"]
"""replicated: every rank holds every weight. mlp: MLP and vocabulary matrices are split. all: attention projections
too. Norms are always replicated."""
WEIGHT_SPLITS: tuple[WeightSplit, ...] = get_args(WeightSplit)
"""From the one that splits least to the one that splits most."""

_UNIT = 8
"""Elements: 16 bytes of bfloat16."""
_SHORTEST_IN_UNITS = 8 * _UNIT
"""Shares of fewer elements are cut to the element: they are too small for the layout of a row to matter."""


def even_shares(extent: int, size: int) -> tuple[range, ...]:
    """`range(extent)` in `size` consecutive pieces, by rank. Their lengths differ by at most one.

    Where pieces are long they are whole units but for the last, and differ by at most one unit: matrix products are
    several times slower where a row does not start on 16 bytes.

    >>> even_shares(5, 3)
    (range(0, 2), range(2, 4), range(4, 5))
    """
    unit = _UNIT if extent >= _SHORTEST_IN_UNITS * size else 1
    units = -(-extent // unit)
    ends = [min(extent, -(-units * rank // size) * unit) for rank in range(size + 1)]
    return tuple(range(start, end) for start, end in pairwise(ends))


@dataclass(frozen=True)
class Partition:
    """One rank's part of a model.

    Raises:
        ConfigError: the vocabulary has fewer tokens than there are ranks to split it over.
    """

    architecture: Architecture
    split: WeightSplit
    rank: int
    size: int
    """Ranks."""

    def __post_init__(self) -> None:
        if self.splits_mlp and self.architecture.vocab_size < self.size:
            raise ConfigError(
                f"--weights {self.split}: a vocabulary of {self.architecture.vocab_size} tokens cannot be split over "
                f"{self.size} ranks; use --weights replicated, or fewer ranks"
            )

    @property
    def splits_mlp(self) -> bool:
        """MLP and vocabulary are split."""
        return self.split != "replicated" and self.size > 1

    @property
    def splits_attention(self) -> bool:
        """The attention projections are split."""
        return self.split == "all" and self.size > 1

    @property
    def qkv(self) -> tuple[range, ...]:
        """By rank, where attention is split: outputs of the fused projection, queries before keys before values."""
        a = self.architecture
        return even_shares((a.num_heads + 2 * a.num_kv_heads) * a.head_dim, self.size)

    @property
    def attended(self) -> tuple[range, ...]:
        """By rank, where attention is split: inputs of the output projection."""
        return even_shares(self.architecture.num_heads * self.architecture.head_dim, self.size)

    @property
    def vocabulary(self) -> tuple[range, ...]:
        """By rank, where it is split: token ids."""
        return even_shares(self.architecture.vocab_size, self.size)

    def tensor_parts(self) -> dict[str, tuple[range, ...]]:
        """What this rank holds: a range per dimension of each tensor of `Architecture.tensor_shapes`, in its order.

        A tensor of which the rank holds nothing by rule is absent: the bias of a matrix that is cut by inputs is added
        by rank 0 alone.
        """
        a = self.architecture
        rows: dict[str, range] = {}  # by module: a part of the outputs
        columns: dict[str, range] = {}  # by module: a part of the inputs
        if self.splits_mlp:
            middle = even_shares(a.intermediate_size, self.size)[self.rank]
            vocabulary = self.vocabulary[self.rank]
            rows |= {"gate_proj": middle, "up_proj": middle, "embed_tokens": vocabulary, "lm_head": vocabulary}
            columns["down_proj"] = middle
        if self.splits_attention:
            fused, start = self.qkv[self.rank], 0
            for module, heads in (("q_proj", a.num_heads), ("k_proj", a.num_kv_heads), ("v_proj", a.num_kv_heads)):
                rows[module] = _overlap(fused, start, start + heads * a.head_dim)
                start += heads * a.head_dim
            columns["o_proj"] = self.attended[self.rank]

        parts: dict[str, tuple[range, ...]] = {}
        for name, shape in a.tensor_shapes().items():
            *_, module, kind = name.split(".")
            if module in rows:
                parts[name] = (rows[module], *map(range, shape[1:]))
            elif module not in columns:
                parts[name] = tuple(map(range, shape))
            elif kind == "weight":
                parts[name] = (range(shape[0]), columns[module])
            elif self.rank == 0:
                parts[name] = (range(shape[0]),)
        return parts

    @property
    def num_parameters(self) -> int:
        """Weights that this rank holds."""
        return sum(prod(map(len, part)) for part in self.tensor_parts().values())

    @property
    def parameters_read(self) -> int:
        """In a decode step: all that the rank holds, but of an embedding of its own only a few rows."""
        if self.architecture.tied_embeddings:
            return self.num_parameters
        rows, columns = self.tensor_parts()["model.embed_tokens.weight"]
        return self.num_parameters - len(rows) * len(columns)

    @property
    def collectives(self) -> int:
        """Calls of a decode step, beside those of attention over the shards and of the token exchange."""
        layers = self.architecture.num_layers
        mlp_and_vocabulary = layers + 2 if self.splits_mlp else 0
        return mlp_and_vocabulary + (2 * layers if self.splits_attention else 0)


def _overlap(share: range, start: int, stop: int) -> range:
    """The part of `share` in [start, stop), counted from `start`."""
    first = max(share.start, start)
    return range(first - start, max(first, min(share.stop, stop)) - start)
