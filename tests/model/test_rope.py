"""Rotary tables beside transformers' own modules, at positions that models are really used at."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from leanserve.model.architecture import read_architecture
from leanserve.model.rope import Rope, rotate
from leanserve.model.rope_parameters import RopeParameters

PUBLISHED = sorted((Path(__file__).parent / "published").glob("*.json"))
POSITIONS = [0, 1, 2, 1000, 4096, 8191, 8192, 32767, 131071]


def both_tables(model_dir: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos and sin over the whole head: ours, then theirs."""
    architecture = read_architecture(model_dir)
    rope = Rope(architecture.rope, head_dim=architecture.head_dim, max_positions=architecture.max_positions)
    positions = torch.tensor(POSITIONS)
    table = rope.table(positions, torch.full_like(positions, positions.max().item() + 1), torch.float32)
    sign = torch.ones(architecture.head_dim)
    sign[: architecture.head_dim // 2] = -1
    config = transformers.AutoConfig.from_pretrained(model_dir)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(torch.empty(1), positions[None])
    return table.cos_N1D[:, 0], table.sin_N1D[:, 0] * sign, their_cos[0], their_sin[0]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_tables_of_published_models(tmp_path: Path, path: Path) -> None:
    (tmp_path / "config.json").write_text(path.read_text())
    our_cos, our_sin, their_cos, their_sin = both_tables(tmp_path)
    torch.testing.assert_close(our_cos, their_cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_sin, their_sin, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.1] * 32, "long_factor": [3.0] * 32, "factor": 16.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.1] * 32,
            "long_factor": [3.0] * 32,
            "original_max_position_embeddings": 4096,
        },
    ],
    ids=["linear", "dynamic", "yarn", "yarn-exact-range", "yarn-no-original", "longrope-factor", "longrope-original"],
)
@pytest.mark.parametrize("outer_original", [None, 2048], ids=["", "outer-original"])
def test_tables_of_scaled_models(tmp_path: Path, scaling: dict[str, Any], outer_original: int | None) -> None:
    config = json.loads((Path(__file__).parent / "published" / "llama-3.2-1b.json").read_text())
    config |= {"rope_scaling": scaling, "max_position_embeddings": 32768}
    if outer_original is not None:
        config["original_max_position_embeddings"] = outer_original
    (tmp_path / "config.json").write_text(json.dumps(config))
    our_cos, our_sin, their_cos, their_sin = both_tables(tmp_path)
    torch.testing.assert_close(our_cos, their_cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_sin, their_sin, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_NHD = torch.randn(7, 5, 16).to(dtype)
    positions = torch.tensor([3, 0, 63, 17, 17, 2, 40])
    config = transformers.LlamaConfig(hidden_size=80, num_attention_heads=5, head_dim=16, max_position_embeddings=64)
    cos, sin = LlamaRotaryEmbedding(config)(x_NHD, positions[None])
    theirs, _ = apply_rotary_pos_emb(x_NHD[None], x_NHD[None], cos, sin, unsqueeze_dim=2)

    rope = Rope(RopeParameters(rope_type="default", rope_theta=10000.0), head_dim=16, max_positions=64)
    ours = rotate(x_NHD, rope.table(positions, None, dtype))
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
