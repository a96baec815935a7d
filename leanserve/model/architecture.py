"""A model's architecture: config.json of a Hugging Face checkpoint as one frozen, checked value. No torch here.

Five families are one decoder with a few switches: pre-norm RMSNorm, grouped-query attention, SwiGLU. What a family's
fields mean together is what transformers 5 makes of them.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from leanserve.contracts.errors import CheckpointError, UnsupportedModelError
from leanserve.model.config_json import JsonFile, shown
from leanserve.model.families import FAMILIES, Family, FamilyDefaults, read_family
from leanserve.model.rope_parameters import RopeParameters, read_rope_parameters

__all__ = ["Architecture", "read_architecture"]

CheckpointDType = Literal["float32", "bfloat16", "float16"]

# Far above any published model; a hostile file cannot make us allocate by naming a size.
_MAX_SIZE = 1 << 24
_MAX_HEADS = 1 << 14
_MAX_LAYERS = 1 << 12
_MAX_POSITIONS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything about a model except its numbers."""

    family: Family
    vocab_size: int
    """Rows of the embedding, logits per token."""
    hidden_size: int
    intermediate_size: int
    """Width of the MLP."""
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides num_heads."""
    head_dim: int
    """Even. Not always hidden_size / num_heads."""
    max_positions: int
    """`max_position_embeddings`; rope scaling may stretch it, see `max_context_tokens`."""
    rms_norm_eps: float
    tied_embeddings: bool
    """The output projection is the embedding matrix."""
    qkv_bias: bool
    """The query, key and value projections add a bias."""
    output_bias: bool
    """The attention output projection adds a bias."""
    mlp_bias: bool
    """The three MLP projections add a bias."""
    qk_norm: bool
    """Queries and keys are RMS-normalised per head before rope."""
    layer_windows: tuple[int | None, ...]
    """Per layer: a token attends to the last this many tokens, itself included. None: to all before it."""
    layer_rope: tuple[bool, ...]
    """Per layer: whether queries and keys are rotated by position."""
    rope: RopeParameters
    """Of all layers that rotate."""
    eos_token_ids: tuple[int, ...]
    """End-of-sequence tokens of config.json and generation_config.json, in that order, each once."""
    checkpoint_dtype: CheckpointDType
    """What the file says its weights are; float32 when it says nothing."""
    notes: tuple[str, ...] = ()
    """Sentences a user should see before serving: fields that are read past, as transformers does."""

    @property
    def max_context_tokens(self) -> int:
        """The model's own limit on prompt + completion."""
        return self.rope.stretch(self.max_positions)

    @property
    def num_parameters(self) -> int:
        """Weights of the model; tied embeddings count once."""
        return sum(map(prod, self.tensor_shapes().values()))

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V that one token takes over all layers, with elements of `dtype_bytes` bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes

    def describe(self) -> str:
        """One line for people: `llama, 32 layers, 8.0B parameters`."""
        parameters = self.num_parameters
        if parameters >= 10**8:
            size = f"{parameters / 10**9:.1f}B"
        elif parameters >= 10**6:
            size = f"{parameters / 10**6:.1f}M"
        else:
            size = f"{parameters / 10**3:.0f}K"
        return f"{self.family}, {self.num_layers} layers, {size} parameters"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint by its name there; weights of projections are [outputs, inputs]."""
        hidden, middle = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}

        def projection(name: str, outputs: int, inputs: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{name}.bias"] = (outputs,)

        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            projection(f"{prefix}.self_attn.q_proj", queries, hidden, self.qkv_bias)
            projection(f"{prefix}.self_attn.k_proj", keys, hidden, self.qkv_bias)
            projection(f"{prefix}.self_attn.v_proj", keys, hidden, self.qkv_bias)
            projection(f"{prefix}.self_attn.o_proj", hidden, queries, self.output_bias)
            if self.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
            projection(f"{prefix}.mlp.gate_proj", middle, hidden, self.mlp_bias)
            projection(f"{prefix}.mlp.up_proj", middle, hidden, self.mlp_bias)
            projection(f"{prefix}.mlp.down_proj", hidden, middle, self.mlp_bias)
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def read_architecture(model_dir: Path) -> Architecture:
    """Read `config.json`, and `generation_config.json` where there is one, of a checkpoint directory.

    Raises:
        UnsupportedModelError: another architecture, remote code, quantized weights, or a feature that is not supported.
        CheckpointError: a file cannot be read, or a field is missing, of the wrong type or out of range.
    """
    config = JsonFile.read(model_dir / "config.json")
    family = read_family(config)
    defaults = FAMILIES[family]

    hidden_size = config.integer("hidden_size", low=1, high=_MAX_SIZE)
    num_layers = config.integer("num_hidden_layers", low=1, high=_MAX_LAYERS)
    num_heads = config.integer("num_attention_heads", low=1, high=_MAX_HEADS)
    num_kv_heads = _read_kv_heads(config, num_heads, defaults)
    head_dim = _read_head_dim(config, hidden_size, num_heads, defaults)
    max_positions = config.integer(
        "max_position_embeddings", low=1, high=_MAX_POSITIONS, default=defaults.max_positions
    )
    vocab_size = config.integer("vocab_size", low=1, high=_MAX_SIZE)
    attention_bias = config.flag("attention_bias", default=False) and family in ("llama", "qwen3", "smollm3")
    layer_rope = _read_layer_rope(config, family, num_layers)
    return Architecture(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", low=1, high=_MAX_SIZE),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rms_norm_eps=config.number("rms_norm_eps", low=0.0, high=1.0, default=1e-6),
        tied_embeddings=config.flag("tie_word_embeddings", default=defaults.tied),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", default=False) and family in ("llama", "smollm3"),
        qk_norm=family == "qwen3",
        layer_windows=_read_layer_windows(config, family, layer_rope, defaults),
        layer_rope=layer_rope,
        rope=read_rope_parameters(
            config, head_dim=head_dim, max_positions=max_positions, default_theta=defaults.rope_theta
        ),
        eos_token_ids=_read_eos_token_ids(model_dir, config, vocab_size, defaults),
        checkpoint_dtype=_read_dtype(config),
        notes=_notes(config),
    )


def _read_kv_heads(config: JsonFile, num_heads: int, defaults: FamilyDefaults) -> int:
    absent = "num_key_value_heads" not in config.values
    default = defaults.num_kv_heads if absent and defaults.num_kv_heads is not None else num_heads
    num_kv_heads = config.integer("num_key_value_heads", low=1, high=_MAX_HEADS, default=default)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{config.path}: num_attention_heads is {num_heads} and num_key_value_heads {num_kv_heads}; the key and "
            "value heads must divide the query heads"
        )
    return num_kv_heads


def _read_head_dim(config: JsonFile, hidden_size: int, num_heads: int, defaults: FamilyDefaults) -> int:
    if "head_dim" not in config and defaults.head_dim is None and hidden_size % num_heads:
        raise CheckpointError(
            f"{config.path}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there "
            "is no head_dim"
        )
    default = defaults.head_dim if defaults.head_dim is not None else hidden_size // num_heads
    head_dim = config.integer("head_dim", low=2, high=4096, default=max(default, 1))
    if head_dim % 2:
        raise CheckpointError(f"{config.path}: head_dim is {head_dim}; rope rotates pairs, so it must be even")
    return head_dim


def _read_layer_rope(config: JsonFile, family: Family, num_layers: int) -> tuple[bool, ...]:
    """SmolLM3 leaves rope out of some layers. In spite of its name, a 1 in `no_rope_layers` is a layer with rope."""
    if family != "smollm3":
        return (True,) * num_layers
    if "no_rope_layers" not in config:
        interval = config.integer("no_rope_layer_interval", low=1, high=_MAX_SIZE, default=4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    flags = config.get("no_rope_layers")
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise config.error("no_rope_layers", f"it must be a list of at least {num_layers} zeros and ones")
    return tuple(bool(flag) for flag in flags[:num_layers])


def _read_layer_windows(
    config: JsonFile, family: Family, layer_rope: tuple[bool, ...], defaults: FamilyDefaults
) -> tuple[int | None, ...]:
    num_layers = len(layer_rope)
    window: int | None = None
    if "sliding_window" in config:
        window = config.integer("sliding_window", low=1, high=_MAX_POSITIONS)
    elif "sliding_window" not in config.values:
        window = defaults.sliding_window

    if family in ("llama", "mistral"):
        if family == "llama" and window is not None:
            raise UnsupportedModelError(
                f"{config.path}: sliding_window is {window}, but LlamaForCausalLM has no sliding window; "
                "MistralForCausalLM has"
            )
        uniform = "full_attention" if window is None else "sliding_attention"
        if "layer_types" in config and config.get("layer_types") != [uniform] * num_layers:
            raise UnsupportedModelError(
                f"{config.path}: layer_types is {shown(config.get('layer_types'))}; all layers of {family} "
                f"are alike, here {uniform}"
            )
        return (window,) * num_layers

    use_window = config.flag("use_sliding_window", default=False)
    if "layer_types" not in config:
        if not use_window or window is None:
            return (None,) * num_layers
        if family == "smollm3":
            return tuple(None if rope else window for rope in layer_rope)
        first = config.integer("max_window_layers", low=0, high=_MAX_SIZE, default=28)
        return tuple(window if layer >= first else None for layer in range(num_layers))

    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise config.error("layer_types", f"it must be a list of {num_layers} strings, one per layer")
    if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise UnsupportedModelError(
            f"{config.path}: layer_types holds {shown(unknown[0])}; full_attention and sliding_attention are supported"
        )
    # Qwen's config class forgets the window unless use_sliding_window is set; SmolLM3's keeps it.
    if family != "smollm3" and not use_window:
        window = None
    if window is None and "sliding_attention" in kinds:
        raise CheckpointError(
            f"{config.path}: layer_types holds sliding_attention, but there is no window (sliding_window is "
            f"{shown(config.get('sliding_window'))}, use_sliding_window is {shown(use_window)})"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _read_eos_token_ids(
    model_dir: Path, config: JsonFile, vocab_size: int, defaults: FamilyDefaults
) -> tuple[int, ...]:
    ids: list[int] = []
    if "eos_token_id" in config.values:
        ids += _token_ids(config, "eos_token_id")
    elif defaults.eos_token_id is not None:
        ids.append(defaults.eos_token_id)
    generation_path = model_dir / "generation_config.json"
    if generation_path.exists():
        ids += _token_ids(JsonFile.read(generation_path), "eos_token_id")
    # Published files carry ids outside the vocabulary (-1 for none): no model can produce them.
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))


def _token_ids(file: JsonFile, name: str) -> list[int]:
    value = file.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise file.error(name, "it must be a token id, a list of them, or null")
    return ids


def _read_dtype(config: JsonFile) -> CheckpointDType:
    name: Any = config.get("dtype") if "dtype" in config else config.get("torch_dtype")
    match name:
        case None:
            return "float32"
        case "float32" | "bfloat16" | "float16":
            return name
        case _:
            raise UnsupportedModelError(
                f"{config.path}: dtype {shown(name)} is not supported; float32, bfloat16 and float16 are"
            )


def _notes(config: JsonFile) -> tuple[str, ...]:
    if "dual_chunk_attention_config" not in config:
        return ()
    note = (
        "config.json asks for dual chunk attention, which is read past: beyond the length the model was pretrained on "
        "its answers will be worse than its authors report"
    )
    return (note,)
