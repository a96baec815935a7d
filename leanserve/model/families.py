"""The model families, and the refusal of everything that is not one of them. No torch.

A family's defaults for absent fields are those of its config class in transformers 5.
"""

from dataclasses import dataclass
from typing import Literal

from leanserve.contracts.errors import UnsupportedModelError
from leanserve.model.config_json import JsonFile, shown

__all__ = ["FAMILIES", "Family", "FamilyDefaults", "read_family"]

Family = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3"]


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """What a family's config class in transformers assumes where config.json is silent."""

    causal_lm: str
    """The one entry of `architectures` that is this decoder with its language-model head."""
    num_kv_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    max_positions: int
    rope_theta: float = 10_000.0
    sliding_window: int | None = None
    tied: bool = False
    eos_token_id: int | None = None


FAMILIES: dict[Family, FamilyDefaults] = {
    "llama": FamilyDefaults(causal_lm="LlamaForCausalLM", max_positions=2048, eos_token_id=2),
    "mistral": FamilyDefaults(
        causal_lm="MistralForCausalLM", num_kv_heads=8, max_positions=131072, sliding_window=4096, eos_token_id=2
    ),
    "qwen2": FamilyDefaults(causal_lm="Qwen2ForCausalLM", num_kv_heads=32, max_positions=32768, sliding_window=4096),
    "qwen3": FamilyDefaults(
        causal_lm="Qwen3ForCausalLM", num_kv_heads=32, head_dim=128, max_positions=32768, sliding_window=4096
    ),
    "smollm3": FamilyDefaults(
        causal_lm="SmolLM3ForCausalLM",
        num_kv_heads=4,
        max_positions=32768,
        rope_theta=2_000_000.0,
        tied=True,
        eos_token_id=128001,
    ),
}

# Fields that change the mathematics of a decoder and that these five families do not define: whoever wrote one of them
# means another model.
_FOREIGN_FEATURES = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_chunk_size",
    "num_local_experts",
    "num_experts",
    "kv_sharing_modes",
    "per_layer_config",
)


def read_family(config: JsonFile) -> Family:
    """The family, after refusing everything that would make the file mean another model."""
    supported = ", ".join(defaults.causal_lm for defaults in FAMILIES.values())
    if "auto_map" in config:
        raise UnsupportedModelError(
            f"{config.path}: auto_map asks for Python code from the checkpoint ({shown(config.get('auto_map'))}); code "
            f"is never run. Supported are the built-in architectures {supported}"
        )
    model_type = config.text("model_type")
    architectures = config.get("architectures")
    family: Family | None = next((name for name in FAMILIES if name == model_type), None)
    if family is None:
        raise UnsupportedModelError(
            f"{config.path}: model_type {shown(model_type)} with architectures {shown(architectures)} is not "
            f"supported; supported are {supported}"
        )
    if architectures is not None and architectures != [FAMILIES[family].causal_lm]:
        raise UnsupportedModelError(
            f"{config.path}: architectures is {shown(architectures)}; for model_type {family} "
            f"{FAMILIES[family].causal_lm} is supported"
        )
    if "quantization_config" in config:
        raise UnsupportedModelError(
            f"{config.path}: quantized weights ({shown(config.get('quantization_config'))}) are not supported; use the "
            "float32, bfloat16 or float16 checkpoint"
        )
    activation = config.text("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"{config.path}: hidden_act {shown(activation)} is not supported; silu is")
    for feature in _FOREIGN_FEATURES:
        if feature in config:
            raise UnsupportedModelError(
                f"{config.path}: {feature} is {shown(config.get(feature))}; this feature is not supported, and "
                f"{FAMILIES[family].causal_lm} does not have it"
            )
    return family
