"""The checkpoint that every measured system loads: a Llama with random weights, made at run time, never committed."""

import json
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from leanserve.model.architecture import Architecture, read_architecture

__all__ = ["ONE_BILLION", "SMALL", "STANDARD", "TINY", "ModelShape", "make_checkpoint"]


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a Llama, under the names of its config.json."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    initializer_range: float
    """Standard deviation of the weights."""


STANDARD = ModelShape(
    num_hidden_layers=8,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=1 << 20,
    initializer_range=0.02,
)
SMALL = ModelShape(
    num_hidden_layers=4,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=2048,
    max_position_embeddings=1 << 20,
    initializer_range=0.1,
)
"""The bundled model's size: a CPU prefills tens of thousands of tokens with it in a minute."""
TINY = ModelShape(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=320,
    max_position_embeddings=1 << 20,
    initializer_range=0.2,
)
"""For trying the command; its figures say nothing."""


ONE_BILLION = ModelShape(
    num_hidden_layers=16,
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=1 << 20,
    initializer_range=0.02,
)
"""Llama 3.2 1B, but for an output matrix of its own: 1.5 billion parameters."""


def make_checkpoint(
    shape: ModelShape, folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Architecture:
    """Write config.json and weights of `dtype`, drawn on `device`, into `folder`. No token ends a text."""
    config = {
        **msgspec.structs.asdict(shape),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    architecture = read_architecture(folder)
    generator = torch.Generator(device).manual_seed(0)
    tensors = {
        name: torch.ones(size, dtype=dtype)
        if name.endswith("norm.weight")
        else torch.empty(size, device=device).normal_(std=shape.initializer_range, generator=generator).to("cpu", dtype)
        for name, size in architecture.tensor_shapes().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return architecture
