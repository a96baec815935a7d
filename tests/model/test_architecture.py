"""config.json -> Architecture: ten published models beside transformers on the meta device, and what fields mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoints import CONFIG_CLASSES, FAMILIES
from leanserve.model.architecture import Architecture, read_architecture
from leanserve.model.decoder import Decoder

PUBLISHED = sorted((Path(__file__).parent / "published").glob("*.json"))

SMALL = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def architecture_of(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Architecture:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_architecture(directory)


@pytest.fixture(params=PUBLISHED, ids=lambda path: path.stem)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    (tmp_path / "config.json").write_text(request.param.read_text())
    return request.param.stem, tmp_path


def test_names_and_shapes_of_published_models_equal_those_of_transformers(published: tuple[str, Path]) -> None:
    _, model_dir = published
    architecture = read_architecture(model_dir)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model_dir))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    assert architecture.tensor_shapes() == theirs
    assert architecture.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_decoder_has_a_place_for_every_tensor_and_no_other(published: tuple[str, Path]) -> None:
    _, model_dir = published
    architecture = read_architecture(model_dir)
    decoder = Decoder(architecture, dtype=torch.bfloat16, device="meta")
    places = decoder.checkpoint_tensors()
    expected = architecture.tensor_shapes()
    assert places.keys() == expected.keys()
    for name, place in places.items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # one row per head
            assert place.shape[1:] == expected[name]
        else:
            assert tuple(place.shape) == expected[name], name
    rows_repeated = sum(p.numel() for n, p in places.items() if n.endswith(("q_norm.weight", "k_norm.weight")))
    rows_stored = 2 * architecture.num_layers * architecture.head_dim if architecture.qk_norm else 0
    assert sum(place.numel() for place in places.values()) == architecture.num_parameters + rows_repeated - rows_stored


def test_facts_of_published_models(tmp_path: Path) -> None:
    def read(stem: str) -> Architecture:
        (tmp_path / "config.json").write_text((Path(__file__).parent / "published" / f"{stem}.json").read_text())
        return read_architecture(tmp_path)

    llama = read("llama-3.1-8b")
    assert llama.describe() == "llama, 32 layers, 8.0B parameters"
    assert llama.kv_bytes_per_token(2) == 131072
    assert (llama.max_positions, llama.checkpoint_dtype, llama.eos_token_ids) == (131072, "bfloat16", (128001,))
    assert read("llama-3.1-70b").eos_token_ids == (128001, 128008, 128009)
    assert read("llama-3.2-1b").tied_embeddings
    assert read("mistral-7b-v0.1").layer_windows == (4096,) * 32
    assert read("mistral-7b-v0.3").layer_windows == (None,) * 32
    million = read("qwen2.5-7b-instruct-1m")
    assert million.qkv_bias
    assert not million.output_bias
    assert million.max_positions == 1_010_000
    assert len(million.notes) == 1
    assert million.layer_windows == (None,) * 28
    qwen3 = read("qwen3-0.6b")
    assert qwen3.qk_norm
    assert qwen3.head_dim * qwen3.num_heads == 2 * qwen3.hidden_size
    assert read("qwen3-32b").num_parameters == 32_762_123_264
    smollm3 = read("smollm3-3b")
    assert [layer for layer, rope in enumerate(smollm3.layer_rope) if not rope] == list(range(3, 36, 4))
    assert smollm3.tied_embeddings, "the family's default, the file is silent"


@pytest.mark.parametrize(
    ("stem", "scaling", "tokens"),
    [
        ("qwen3-0.6b", None, 40_960),
        ("qwen3-0.6b", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        ("qwen3-0.6b", {"rope_type": "yarn", "factor": 1.1, "original_max_position_embeddings": 32_768}, 40_960),
        ("mistral-7b-v0.3", {"rope_type": "yarn", "factor": 4}, 131_072),
        ("mistral-7b-v0.3", {"type": "linear", "factor": 2.5}, 81_920),
        ("mistral-7b-v0.3", {"type": "linear", "factor": 1e9}, 2**31 - 1),
        ("mistral-7b-v0.3", {"type": "dynamic", "factor": 2}, 65_536),
        ("llama-3.1-8b", ..., 131_072),
    ],
)
def test_the_longest_context_is_what_rope_scaling_makes_of_it(
    tmp_path: Path, stem: str, scaling: Any, tokens: int
) -> None:
    config = json.loads((Path(__file__).parent / "published" / f"{stem}.json").read_text())
    if scaling is not ...:
        config["rope_scaling"] = scaling
    assert architecture_of(tmp_path, config).max_context_tokens == tokens


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": None}),
    ("llama", {}),
    *(
        (family, fields)
        for family in ("qwen2", "qwen3")
        for fields in (
            {},
            {"sliding_window": 7},
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2},
            {"use_sliding_window": True, "max_window_layers": 0},
            {"sliding_window": 7, "use_sliding_window": True},
            {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 2},
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
            {"sliding_window": 7, "use_sliding_window": False, "layer_types": ["full_attention"] * 6},
        )
    ),
    ("smollm3", {}),
    ("smollm3", {"sliding_window": 7, "use_sliding_window": True}),
    ("smollm3", {"sliding_window": 7}),
    ("smollm3", {"sliding_window": 7, "use_sliding_window": True, "no_rope_layer_interval": 3}),
    ("smollm3", {"sliding_window": 7, "use_sliding_window": True, "no_rope_layers": [1, 0, 0, 1, 1, 0, 1]}),
    ("smollm3", {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 3}),
]


@pytest.mark.parametrize(("family", "fields"), WINDOWS)
def test_windows_and_rope_layers_are_those_of_transformers(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    ours = architecture_of(tmp_path, {"model_type": family, **SMALL, **fields})
    theirs = CONFIG_CLASSES[family](**(SMALL | fields))
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * theirs.num_hidden_layers
    assert ours.layer_windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    rotates = getattr(theirs, "no_rope_layers", [1] * theirs.num_hidden_layers)
    assert ours.layer_rope == tuple(bool(flag) for flag in rotates[: theirs.num_hidden_layers])


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_mean_what_transformers_assumes(tmp_path: Path, family: str) -> None:
    sizes = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes["num_attention_heads"] = 32
    sizes["hidden_size"] = 64
    ours = architecture_of(tmp_path, {"model_type": family, **sizes})
    theirs = CONFIG_CLASSES[family](**sizes)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == ((theirs.eos_token_id,) if (theirs.eos_token_id or 1e9) < 64 else ())


def test_end_tokens_of_both_files_are_united(tmp_path: Path) -> None:
    config = {"model_type": "llama", **SMALL}
    assert architecture_of(tmp_path, config | {"eos_token_id": [7, 3]}).eos_token_ids == (7, 3)
    assert architecture_of(tmp_path, config | {"eos_token_id": None}).eos_token_ids == ()
    generation = {"eos_token_id": [3, 5, -1, 64]}
    assert architecture_of(tmp_path, config | {"eos_token_id": 7}, generation).eos_token_ids == (7, 3, 5)
    assert architecture_of(tmp_path, config | {"eos_token_id": 7}, {"eos_token_id": 2}).eos_token_ids == (7, 2)


@pytest.mark.parametrize(
    ("family", "fields", "biased"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"q", "k", "v", "o", "gate", "up", "down"}),
        ("llama", {"mlp_bias": True}, {"gate", "up", "down"}),
        ("qwen2", {}, {"q", "k", "v"}),
        ("qwen3", {"attention_bias": True}, {"q", "k", "v", "o"}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}, {"q", "k", "v", "o", "gate", "up", "down"}),
        ("mistral", {}, set()),
    ],
)
def test_biases(tmp_path: Path, family: str, fields: dict[str, bool], biased: set[str]) -> None:
    shapes = architecture_of(tmp_path, {"model_type": family, **SMALL, **fields}).tensor_shapes()
    assert {name.split(".")[-2].removesuffix("_proj") for name in shapes if name.endswith(".bias")} == biased


def test_dtype_in_both_spellings(tmp_path: Path) -> None:
    config = {"model_type": "llama", **SMALL}
    assert architecture_of(tmp_path, config).checkpoint_dtype == "float32"
    assert architecture_of(tmp_path, config | {"torch_dtype": "float16"}).checkpoint_dtype == "float16"
    assert architecture_of(tmp_path, config | {"dtype": "bfloat16"}).checkpoint_dtype == "bfloat16"
