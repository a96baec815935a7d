"""Small random checkpoints of every family, made and answered by transformers: the truth that other tests compare with.

    model_dir = checkpoint(tmp_path_factory, "qwen3", heads=6, kv_heads=2, head_dim=16)
    expected = hf_greedy(model_dir, prompts, max_new_tokens=8)

Plain random weights hide attention errors: every key looks alike, so the output barely depends on which are read. These
are sharpened (queries and keys x 3, values and outputs x 6).
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from leanserve.model.architecture import read_architecture
from leanserve.model.decoder import Decoder
from leanserve.model.weights import load_weights

NEAR_TIE = 2e-4
"""Two logits closer than this may change places by rounding: float32 is wrong by up to 6e-5 in these models."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
VOCAB_SIZE = 199

transformers.logging.disable_progress_bar()

CONFIG_CLASSES: dict[str, type[transformers.PreTrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "smollm3": transformers.SmolLM3Config,
}


def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden: int = 60,
    layers: int = 3,
    window: int | None = None,
    tied: bool = False,
    rope: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    sharpen: bool = True,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """The directory of a random checkpoint; made once per session for the same arguments. Treat it as read-only.

    Args:
        hidden: not heads * head_dim by default; a multiple of heads, which Llama's config class wants.
        window: sliding window. For Qwen from layer 1 on, for SmolLM3 in the layers without rope, for Mistral in all.
        rope: `rope_parameters`, rope_theta included.
        max_shard_size: "20KB" gives several files and an index.
        config: more fields of the family's config class. There is no eos token unless `eos_token_id` is given.
    """
    arguments = {key: value for key, value in locals().items() if key != "tmp_path_factory"}
    name = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()[:16]
    directory = tmp_path_factory.getbasetemp() / "checkpoints" / f"{family}-{name}"
    if directory.exists():
        return directory

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden + 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.8 * hidden**-0.5,  # every projection keeps its input's scale, whatever its width
    }
    if family in ("mistral", "qwen2", "qwen3", "smollm3"):
        fields["sliding_window"] = window
    if family in ("qwen2", "qwen3", "smollm3"):
        fields["use_sliding_window"] = window is not None
    if family in ("qwen2", "qwen3"):
        fields["max_window_layers"] = 1
    if family == "smollm3":
        fields["no_rope_layer_interval"] = 2
    if rope is not None:
        fields["rope_parameters"] = dict(rope)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG_CLASSES[family](**(fields | config)))
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            if tensor_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif tensor_name.endswith("bias"):
                parameter.normal_(std=0.3)
            if sharpen:
                parameter *= _sharpening(tensor_name)
    staging = directory.with_name(directory.name + ".part")
    model.to(dtype).save_pretrained(staging, max_shard_size=max_shard_size)
    staging.rename(directory)
    return directory


def _sharpening(tensor_name: str) -> float:
    if "q_proj" in tensor_name or "k_proj" in tensor_name:
        return 3.0
    if "q_norm" in tensor_name or "k_norm" in tensor_name:  # Qwen3: the norm undoes what is done to the projections
        return 2.0
    if "v_proj" in tensor_name or "o_proj" in tensor_name:
        return 6.0
    return 1.0


def random_prompts(lengths: Sequence[int], *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """One prompt of random token ids per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def load_decoder(model_dir: Path, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """Our Decoder with a checkpoint's weights, whole and on the CPU."""
    decoder = Decoder(read_architecture(model_dir), dtype=dtype)
    load_weights(decoder, model_dir)
    return decoder


def hf_model(model_dir: Path) -> transformers.PreTrainedModel:
    """A float32 model of one's own: dynamic rope remembers the longest sequence that an instance has seen."""
    return copy.deepcopy(_loaded(model_dir))


@lru_cache(maxsize=32)
def _loaded(model_dir: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.inference_mode()
def hf_logits(model_dir: Path, prompt: Sequence[int]) -> torch.Tensor:
    """Float32 logits [len(prompt), vocabulary] of transformers."""
    return hf_model(model_dir)(torch.tensor([list(prompt)])).logits[0]


def hf_greedy(model_dir: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The tokens that transformers' `generate` adds to each prompt alone: greedy, float32, at most max_new_tokens.

    Raises:
        AssertionError: rounding decides between two of them, so that another answer would be as right.
    """
    return [list(_hf_greedy(model_dir, tuple(prompt), max_new_tokens)) for prompt in prompts]


@lru_cache(maxsize=4096)
@torch.inference_mode()
def _hf_greedy(model_dir: Path, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    model = hf_model(model_dir)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_S2 = torch.cat(output.logits).topk(2).values
    gap = float((best_S2[:, 0] - best_S2[:, 1]).min())
    assert gap > NEAR_TIE, f"the two best tokens are {gap:.0e} apart: take another prompt or seed"
    return tuple(output.sequences[0, len(prompt) :].tolist())
