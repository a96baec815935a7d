"""Rotary embedding: positions -> cos and sin, once per step for all layers.

N tokens of a step, D head dim, H heads. Angles and their cosines are computed in float32, as transformers does; the
frequencies of every type but the default come from `transformers.modeling_rope_utils`, which is imported only for them.

Two types depend on the length of the sequence, and transformers' `generate` decides it as it goes: a prompt is rotated
for its own length, a generated token for the length it makes. Keys already cached are never rotated again. Here the
same rule is a function of one token: a token at position p of a sequence whose prompt has L tokens is rotated for a
sequence of max(L, p + 1) tokens. It does not matter how the prompt is cut into chunks, who shares the batch, or whether
the tokens are computed a second time after a preemption: the angles are those of `generate` on a freshly loaded model.

- dynamic: up to max_position_embeddings tokens the plain series; beyond, its base grows with the length;
- longrope: `short_factor` up to original_max_position_embeddings tokens, `long_factor` beyond.

(A cache that lends one sequence's pages to another must therefore keep prompts of different regimes apart for these two
types: `Rope.depends_on_length`.)
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from leanserve.model.rope_parameters import RopeParameters

__all__ = ["Rope", "RotaryTable", "rotate"]


@dataclass(frozen=True)
class RotaryTable:
    """The rotation of a step's tokens, as factors for `rotate`. Both [N, 1, D], in the model's dtype."""

    cos_N1D: Tensor
    sin_N1D: Tensor
    """Negative in the first half of D."""


def rotate(x_NHD: Tensor, table: RotaryTable) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its token's angle (Su et al., 2021, in the half-split layout).

    Args:
        x_NHD: queries or keys, any strides.

    Returns:
        A new contiguous tensor of the same shape and dtype.
    """
    half = x_NHD.shape[-1] // 2
    return (x_NHD * table.cos_N1D).addcmul_(torch.roll(x_NHD, half, -1), table.sin_N1D)


class Rope:
    """Angles of absolute positions.

    Args:
        parameters: from the architecture.
        head_dim: D.
        max_positions: `max_position_embeddings`; the dynamic type grows beyond it.
    """

    def __init__(
        self, parameters: RopeParameters, *, head_dim: int, max_positions: int, device: torch.device | str = "cpu"
    ) -> None:
        self.parameters = parameters
        self.head_dim = head_dim
        self.max_positions = max_positions
        inverse, self.scale = _inverse_frequencies(parameters, head_dim, max_positions, long=False)
        self.inverse_frequencies_D2 = inverse.to(device)
        self.long_inverse_frequencies_D2: Tensor | None = None
        if parameters.rope_type == "longrope":
            long_inverse, _ = _inverse_frequencies(parameters, head_dim, max_positions, long=True)
            self.long_inverse_frequencies_D2 = long_inverse.to(device)

    @property
    def depends_on_length(self) -> bool:
        """Whether `table` needs the prompt lengths."""
        return self.parameters.depends_on_length

    def table(self, positions_N: Tensor, prompt_lengths_N: Tensor | None, dtype: torch.dtype) -> RotaryTable:
        """The rotation of a step's tokens.

        Args:
            positions_N: absolute position of each token in its sequence, integer.
            prompt_lengths_N: tokens in the prompt of each token's sequence, integer. Read only where
                `depends_on_length`.
            dtype: of the factors; the angles are float32.

        Raises:
            ValueError: the type depends on the length and there are no prompt lengths.
        """
        inverse_ND2 = self.inverse_frequencies_D2
        if self.depends_on_length:
            if prompt_lengths_N is None:
                raise ValueError(f"{self.parameters.rope_type} rope needs the prompt length of every token")
            inverse_ND2 = self._inverse_for_lengths(torch.maximum(prompt_lengths_N, positions_N + 1)[:, None])
        angles_ND2 = positions_N[:, None].float() * inverse_ND2
        cos_ND2, sin_ND2 = angles_ND2.cos() * self.scale, angles_ND2.sin() * self.scale
        return RotaryTable(
            torch.cat((cos_ND2, cos_ND2), -1).to(dtype).unsqueeze(1),
            torch.cat((-sin_ND2, sin_ND2), -1).to(dtype).unsqueeze(1),
        )

    def _inverse_for_lengths(self, lengths_N1: Tensor) -> Tensor:
        """Inverse frequencies [N, D/2] of tokens whose sequences have these lengths."""
        if self.long_inverse_frequencies_D2 is not None:
            original_length = self.parameters.original_max_position_embeddings
            assert original_length is not None
            return torch.where(
                lengths_N1 > original_length, self.long_inverse_frequencies_D2, self.inverse_frequencies_D2
            )
        factor, dim = self.parameters.factor, self.head_dim
        assert factor is not None
        grown_N1 = lengths_N1.clamp(min=self.max_positions)
        stretch_N1 = (factor * grown_N1 / self.max_positions) - (factor - 1)
        base_N1 = self.parameters.rope_theta * stretch_N1 ** (dim / (dim - 2))
        inverse_ND2 = 1.0 / base_N1 ** _exponents(dim, lengths_N1.device)
        return torch.where(lengths_N1 > self.max_positions, inverse_ND2, self.inverse_frequencies_D2)


def _exponents(dim: int, device: torch.device | str) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


@dataclass
class _RopeConfig:
    """The part of a transformers config that its rope functions read."""

    rope_parameters: dict[str, object]
    head_dim: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int

    def standardize_rope_params(self) -> None:
        """They are in the standard form already."""


def _inverse_frequencies(
    parameters: RopeParameters, head_dim: int, max_positions: int, *, long: bool
) -> tuple[Tensor, float]:
    """Inverse frequencies [D/2], float32 on the CPU, and the scale of cos and sin."""
    if parameters.rope_type == "default":
        return 1.0 / parameters.rope_theta ** _exponents(head_dim, "cpu"), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = _RopeConfig(
        rope_parameters=asdict(parameters),
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_positions,
    )
    length = None
    if long:
        assert parameters.original_max_position_embeddings is not None
        length = parameters.original_max_position_embeddings + 1
    inverse, scale = ROPE_INIT_FUNCTIONS[parameters.rope_type](config, torch.device("cpu"), seq_len=length)
    return inverse, float(scale)
