"""Rotary embedding parameters of a config.json, in one form whatever the spelling. No torch; the tables are in `rope`.

Two spellings exist: `rope_theta` beside a `rope_scaling` object, and since transformers 5 one `rope_parameters` object
that holds both. Which value wins is decided as transformers 5 decides it.
"""

from dataclasses import dataclass

from leanserve.contracts.errors import UnsupportedModelError
from leanserve.model.config_json import JsonFile, shown

__all__ = ["ROPE_TYPES", "RopeParameters", "read_rope_parameters"]

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """How positions become angles. Fields carry the names of `rope_parameters` in config.json."""

    rope_type: str
    """One of ROPE_TYPES."""
    rope_theta: float
    """The base of the geometric series of wavelengths."""
    factor: float | None = None
    """How far the context is stretched: linear, dynamic, llama3, yarn; optional for longrope."""
    original_max_position_embeddings: int | None = None
    """Tokens of context in pretraining: llama3, yarn, longrope."""
    attention_factor: float | None = None
    """Scale of cos and sin: yarn, longrope. None: the paper's formula."""
    low_freq_factor: float | None = None
    """llama3."""
    high_freq_factor: float | None = None
    """llama3."""
    beta_fast: float | None = None
    """yarn. None: 32."""
    beta_slow: float | None = None
    """yarn. None: 1."""
    mscale: float | None = None
    """yarn."""
    mscale_all_dim: float | None = None
    """yarn."""
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""
    short_factor: tuple[float, ...] | None = None
    """longrope: head_dim / 2 divisors for sequences of up to original_max_position_embeddings tokens."""
    long_factor: tuple[float, ...] | None = None
    """longrope: the same for longer sequences."""

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles of a position depend on how long its sequence is, and not only on the position."""
        return self.rope_type in ("dynamic", "longrope")

    def stretch(self, max_positions: int) -> int:
        """Tokens of context that a model of `max_positions` has with this scaling, as vLLM derives it.

        With linear and dynamic scaling max_position_embeddings is the length before it, as transformers asks; with yarn
        it may be either, beside the original length; with llama3 and longrope the length after it.
        """
        before = {"linear": max_positions, "dynamic": max_positions, "yarn": self.original_max_position_embeddings}
        stretched = (before.get(self.rope_type) or 0) * (self.factor or 1.0)
        return max(max_positions, int(min(stretched, _MAX_TOKENS)))


def read_rope_parameters(
    config: JsonFile, *, head_dim: int, max_positions: int, default_theta: float
) -> RopeParameters:
    """The rotary parameters of a config.json, checked.

    Args:
        config: the whole file.
        head_dim: longrope's factor lists hold half as many numbers.
        max_positions: `max_position_embeddings`, which stands in for an absent original length.
        default_theta: the family's base when the file names none.

    Raises:
        UnsupportedModelError: a rope type, or a feature of one, that is not supported.
        CheckpointError: a field is missing, of the wrong type or out of range.
    """
    scaling = config.table("rope_scaling") or config.table("rope_parameters") or JsonFile(config.path, {})
    if any(isinstance(value, dict) for value in scaling.values.values()):
        raise UnsupportedModelError(
            f"{scaling.path}: different rope parameters for different kinds of layers ({', '.join(scaling.values)}) "
            "are not supported; one set for all layers is"
        )
    rope_type = scaling.get("rope_type") if "rope_type" in scaling.values else scaling.values.get("type", "default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{scaling.path}: rope type {shown(rope_type)} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    for source in (scaling, config):
        if "partial_rotary_factor" in source and source.get("partial_rotary_factor") != 1:
            raise UnsupportedModelError(
                f"{source.path}: partial_rotary_factor is {shown(source.get('partial_rotary_factor'))}; rope over the "
                "whole head (1.0) is supported"
            )
    theta_source = scaling if "rope_theta" in scaling.values else config
    theta = theta_source.number("rope_theta", low=1.0, high=1e15, default=default_theta)

    def original_length() -> int:
        source = config if "original_max_position_embeddings" in config else scaling
        return source.integer("original_max_position_embeddings", low=1, high=_MAX_TOKENS, default=max_positions)

    def number(name: str, *, low: float = 1e-9) -> float:
        return scaling.number(name, low=low)

    def optional(name: str) -> float | None:
        return scaling.optional_number(name, low=0.0)

    common = {"rope_type": rope_type, "rope_theta": theta}
    match rope_type:
        case "linear":
            return RopeParameters(**common, factor=number("factor"))
        case "dynamic":
            if head_dim <= 2:  # the formula's exponent is head_dim / (head_dim - 2)
                raise config.error("head_dim", "dynamic rope needs more than 2")
            return RopeParameters(**common, factor=number("factor", low=1.0))
        case "llama3":
            low, high = number("low_freq_factor"), number("high_freq_factor")
            if high <= low:
                raise scaling.error("high_freq_factor", f"it must be above low_freq_factor, {low:g}")
            return RopeParameters(
                **common,
                factor=number("factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=original_length(),
            )
        case "yarn":
            if theta <= 1.0:
                raise theta_source.error("rope_theta", "yarn needs a base above 1")
            return RopeParameters(
                **common,
                factor=number("factor"),
                original_max_position_embeddings=original_length(),
                attention_factor=optional("attention_factor"),
                beta_fast=optional("beta_fast"),
                beta_slow=optional("beta_slow"),
                mscale=optional("mscale"),
                mscale_all_dim=optional("mscale_all_dim"),
                truncate=scaling.flag("truncate", default=True),
            )
        case "longrope":
            original = original_length()
            if original < 2:
                raise scaling.error("original_max_position_embeddings", "longrope needs at least 2")
            return RopeParameters(
                **common,
                factor=scaling.optional_number("factor", low=1e-9),
                original_max_position_embeddings=original,
                attention_factor=optional("attention_factor"),
                short_factor=scaling.numbers("short_factor", length=head_dim // 2, low=1e-9),
                long_factor=scaling.numbers("long_factor", length=head_dim // 2, low=1e-9),
            )
        case _:
            return RopeParameters(**common)
