"""The decoder beside transformers, float32: logits of random sharpened checkpoints, and greedy tokens step by step.

Attention here is the plainest that can be: one sequence, all keys in one tensor. Paging and ranks have their own tests.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import FAMILIES, checkpoint, hf_greedy, hf_logits, load_decoder, random_prompts
from leanserve.model.architecture import Architecture
from leanserve.model.decoder import Decoder

LOGIT_TOLERANCE = 2e-5  # of their scale, the largest one

SHAPES = [  # query heads, KV heads, head_dim, hidden
    (6, 2, 16, 60),
    (5, 5, 20, 35),
    (14, 2, 8, 70),
    (9, 3, 10, 63),
]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 700.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.3},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": YARN,
    "yarn-betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn-attention-factor": YARN | {"attention_factor": 1.3},
    "yarn-mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.5, 1.7, 2.0, 2.2],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
    },
}
MAX_POSITIONS = 64
"""Of the rope checkpoints: dynamic rope begins to stretch here."""


class DenseAttention:
    """Attention of one sequence, with all of its keys and values."""

    def __init__(self, architecture: Architecture, windows: tuple[int | None, ...] | None = None) -> None:
        self.windows = windows or architecture.layer_windows
        self.k: list[Tensor | None] = [None] * architecture.num_layers
        self.v: list[Tensor | None] = [None] * architecture.num_layers

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        old_k, old_v = self.k[layer], self.v[layer]
        self.k[layer] = k_SKD = k_NKD.clone() if old_k is None else torch.cat((old_k, k_NKD))
        self.v[layer] = v_SKD = v_NKD.clone() if old_v is None else torch.cat((old_v, v_NKD))
        (n, h, d), (s, k, _) = q_NHD.shape, k_SKD.shape
        scores = torch.einsum("nkgd,skd->kgns", q_NHD.reshape(n, k, h // k, d), k_SKD) * d**-0.5
        distance_NS = torch.arange(s - n, s)[:, None] - torch.arange(s)
        hidden_NS = distance_NS < 0
        if (window := self.windows[layer]) is not None:
            hidden_NS |= distance_NS >= window
        weights = scores.masked_fill(hidden_NS, float("-inf")).softmax(-1)
        return torch.einsum("kgns,skd->nkgd", weights, v_SKD).reshape(n, h, d)


def run(decoder: Decoder, attention: DenseAttention, tokens: list[int], start: int, prompt_length: int) -> Tensor:
    hidden_NC = decoder.forward(
        torch.tensor(tokens),
        torch.arange(start, start + len(tokens)),
        attention,
        prompt_lengths_N=torch.full((len(tokens),), prompt_length),
    )
    return decoder.logits(hidden_NC)


def logits_of(decoder: Decoder, prompt: list[int], windows: tuple[int | None, ...] | None = None) -> Tensor:
    return run(decoder, DenseAttention(decoder.architecture, windows), prompt, 0, len(prompt))


def greedy(decoder: Decoder, prompt: list[int], new_tokens: int, *, chunk: int) -> list[int]:
    """Chunked prefill, then one token at a time."""
    attention = DenseAttention(decoder.architecture)
    for start in range(0, len(prompt), chunk):
        logits_NV = run(decoder, attention, prompt[start : start + chunk], start, len(prompt))
    tokens = [int(logits_NV[-1].argmax())]
    while len(tokens) < new_tokens:
        logits_NV = run(decoder, attention, tokens[-1:], len(prompt) + len(tokens) - 1, len(prompt))
        tokens.append(int(logits_NV[-1].argmax()))
    return tokens


def worst(ours: Tensor, truth: Tensor) -> float:
    """Largest difference as a part of the largest logit."""
    return ((ours.float() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}q-{s[1]}kv-{s[2]}d-{s[3]}c")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tmp_path_factory: pytest.TempPathFactory, family: str, shape: tuple[int, int, int, int]) -> None:
    heads, kv_heads, head_dim, hidden = shape
    model_dir = checkpoint(
        tmp_path_factory,
        family,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        tied=kv_heads == 2,
        window=11 if family != "llama" and kv_heads == 3 else None,
        max_shard_size="20KB" if kv_heads == 5 else "5GB",
    )
    decoder = load_decoder(model_dir)
    for prompt in random_prompts([1, 2, 83]):
        assert worst(logits_of(decoder, prompt), hf_logits(model_dir, prompt)) < LOGIT_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_logits_with_biases_everywhere(tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    model_dir = checkpoint(tmp_path_factory, family, attention_bias=True, mlp_bias=True)
    (prompt,) = random_prompts([40])
    assert worst(logits_of(load_decoder(model_dir), prompt), hf_logits(model_dir, prompt)) < LOGIT_TOLERANCE


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_a_window_one_too_small_or_large_is_told_apart(tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    model_dir = checkpoint(tmp_path_factory, family, window=9)
    decoder = load_decoder(model_dir)
    windows = decoder.architecture.layer_windows
    assert set(windows) == ({9} if family == "mistral" else {9, None})
    (prompt,) = random_prompts([50])
    truth = hf_logits(model_dir, prompt)
    assert worst(logits_of(decoder, prompt), truth) < LOGIT_TOLERANCE
    for wrong in (8, 10):
        changed = tuple(wrong if window == 9 else window for window in windows)
        assert worst(logits_of(decoder, prompt, changed), truth) > 100 * LOGIT_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_one_wrong_page_of_values_shows(tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    """The checkpoints are sharp enough to be a test of attention."""
    model_dir = checkpoint(tmp_path_factory, family)
    decoder = load_decoder(model_dir)
    (prompt,) = random_prompts([200])
    truth = hf_logits(model_dir, prompt)[-1]

    class OnePageSwapped(DenseAttention):
        def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            v_NKD = v_NKD.clone()
            if layer == 1:
                v_NKD[64:80] = v_NKD[80:96]
            return super().__call__(layer, q_NHD, k_NKD, v_NKD)

    broken = run(decoder, OnePageSwapped(decoder.architecture), prompt, 0, len(prompt))[-1]
    assert worst(broken, truth) > 100 * LOGIT_TOLERANCE


def rope_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, family: str, rope: dict[str, Any], *, old_spelling: bool, target: Path
) -> Path:
    """A checkpoint whose config.json spells its rope in one of the two ways."""
    model_dir = checkpoint(tmp_path_factory, family, rope=rope, max_position_embeddings=MAX_POSITIONS)
    config = json.loads((model_dir / "config.json").read_text())
    if old_spelling:
        scaling = config.pop("rope_parameters")
        config["rope_theta"] = scaling.pop("rope_theta")
        scaling["type"] = scaling.pop("rope_type")
        config["rope_scaling"] = None if scaling == {"type": "default"} else scaling
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(model_dir / "model.safetensors")
    return target


@pytest.mark.parametrize("old_spelling", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_in_both_spellings(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, rope: str, old_spelling: bool
) -> None:
    family = FAMILIES[list(ROPES).index(rope) % len(FAMILIES)]
    model_dir = rope_checkpoint(tmp_path_factory, family, ROPES[rope], old_spelling=old_spelling, target=tmp_path)
    decoder = load_decoder(model_dir)
    assert decoder.architecture.rope.rope_type == ROPES[rope]["rope_type"]
    for prompt in random_prompts([20, 33, MAX_POSITIONS, MAX_POSITIONS + 1, 150]):
        assert worst(logits_of(decoder, prompt), hf_logits(model_dir, prompt)) < LOGIT_TOLERANCE


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "yarn"])
def test_greedy_tokens_across_the_lengths_where_rope_changes(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, rope: str
) -> None:
    model_dir = rope_checkpoint(tmp_path_factory, "llama", ROPES[rope], old_spelling=False, target=tmp_path)
    decoder = load_decoder(model_dir)
    prompts = random_prompts([5, 31, 32, 33, MAX_POSITIONS - 3, MAX_POSITIONS, MAX_POSITIONS + 9])
    expected = hf_greedy(model_dir, prompts, 12)
    assert [greedy(decoder, prompt, 12, chunk=100) for prompt in prompts] == expected
    assert [greedy(decoder, prompt, 12, chunk=7) for prompt in prompts] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_with_chunked_prefill(tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    model_dir = checkpoint(tmp_path_factory, family, window=None if family == "llama" else 9)
    decoder = load_decoder(model_dir)
    prompts = random_prompts([1, 8, 9, 10, 60], seed=1)
    assert [greedy(decoder, prompt, 8, chunk=13) for prompt in prompts] == hf_greedy(model_dir, prompts, 8)


def test_length_dependent_rope_asks_for_the_prompt_lengths(tmp_path_factory: pytest.TempPathFactory) -> None:
    decoder = load_decoder(checkpoint(tmp_path_factory, "llama", rope=ROPES["dynamic"]))
    with pytest.raises(ValueError, match="dynamic rope needs the prompt length"):
        decoder.forward(torch.tensor([1]), torch.tensor([0]), DenseAttention(decoder.architecture))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=["bf16", "fp16"])
def test_half_precision_is_close(
    tmp_path_factory: pytest.TempPathFactory, family: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Unsharpened: peaked softmax over 16-bit scores is no measure of anything."""
    model_dir = checkpoint(tmp_path_factory, family, sharpen=False)
    decoder = load_decoder(model_dir, dtype=dtype)
    (prompt,) = random_prompts([40])
    logits_NV = logits_of(decoder, prompt)
    assert logits_NV.dtype == torch.float32
    assert worst(logits_NV, hf_logits(model_dir, prompt)) < tolerance


def test_a_bfloat16_checkpoint_in_float32(tmp_path_factory: pytest.TempPathFactory) -> None:
    model_dir = checkpoint(tmp_path_factory, "qwen2", dtype=torch.bfloat16)
    decoder = load_decoder(model_dir)
    assert decoder.architecture.checkpoint_dtype == "bfloat16"
    (prompt,) = random_prompts([40])
    assert worst(logits_of(decoder, prompt), hf_logits(model_dir, prompt)) < LOGIT_TOLERANCE
