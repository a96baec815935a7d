"""Whatever stands in config.json, the answer is an architecture or an error that names the field."""

import json
from pathlib import Path
from typing import Any

import pytest

from leanserve.contracts.errors import CheckpointError, ModelError, UnsupportedModelError
from leanserve.model.architecture import read_architecture

GOOD: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def read(directory: Path, changes: dict[str, Any]) -> None:
    config = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    read_architecture(directory)


def rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, "gemma3_text.*supported are LlamaFor"),
    ({"architectures": ["SmolLM3ForSequenceClassification"]}, "SequenceClassification.*SmolLM3ForCausalLM"),
    ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*SmolLM3ForCausalLM"),
    ({"architectures": "SmolLM3ForCausalLM"}, "architectures"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}, "auto_map.*code.*never run"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized.*gptq"),
    ({"hidden_act": "gelu"}, "hidden_act.*gelu.*silu"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"layer_types": ["linear_attention"] * 4}, "linear_attention.*full_attention"),
    ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn.*bfloat16"),
    ({"dtype": 16}, "dtype 16"),
    (rope("proportional"), "proportional.*default, linear, dynamic, llama3, yarn, longrope"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "mrope.*supported are"),
    (rope(None), "rope type null"),  # type: ignore[arg-type]
    (rope(["yarn"]), "rope type"),  # type: ignore[arg-type]
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "different rope parameters"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (rope("default", partial_rotary_factor=0.25), "partial_rotary_factor is 0.25"),
    (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sliding_window": 9},
        "sliding_window is 9.*MistralForCausalLM",
    ),
    (
        {
            "model_type": "mistral",
            "architectures": None,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        "layer_types.*alike",
    ),
]

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": ...}, "model_type is missing"),
    ({"model_type": 7}, "model_type is 7"),
    ({"vocab_size": ...}, "vocab_size is missing"),
    ({"vocab_size": "64"}, 'vocab_size is "64".*integer'),
    ({"hidden_size": 0}, "hidden_size is 0.*from 1"),
    ({"hidden_size": 48.0}, "hidden_size is 48.0"),
    ({"hidden_size": [48]}, "hidden_size"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ({"num_hidden_layers": True}, "num_hidden_layers is true"),
    ({"intermediate_size": None}, "intermediate_size is null"),
    ({"num_attention_heads": 10**400}, "num_attention_heads is 1000"),
    ({"num_key_value_heads": 4}, "num_attention_heads is 6 and num_key_value_heads 4"),
    ({"head_dim": 15}, "head_dim is 15.*even"),
    ({"head_dim": ..., "hidden_size": 50}, "hidden_size 50 is not a multiple"),
    ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*true or false"),
    ({"attention_bias": 1}, "attention_bias is 1"),
    ({"eos_token_id": "</s>"}, "eos_token_id.*token id"),
    ({"eos_token_id": [1, 2.5]}, "eos_token_id"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types.*list of 4"),
    ({"layer_types": ["sliding_attention"] * 4}, "sliding_attention, but there is no window"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers.*at least 4"),
    ({"no_rope_layers": [1, 0, 2, "x"]}, "no_rope_layers"),
    ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"rope_theta": float("inf")}, "rope_theta is Infinity"),
    ({"rope_scaling": [1, 2]}, "rope_scaling.*object"),
    (rope("linear"), "factor is missing"),
    (rope("linear", factor="2"), 'factor is "2"'),
    (rope("dynamic", factor=0.5), "factor is 0.5"),
    ({"head_dim": 2} | rope("dynamic", factor=2.0), "head_dim is 2"),
    (rope("llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0), "high_freq_factor is 4.0.*above"),
    (rope("llama3", factor=8.0, low_freq_factor=1.0), "high_freq_factor is missing"),
    (rope("yarn", factor=0), "factor is 0"),
    (rope("yarn", factor=4.0, original_max_position_embeddings="8k"), "original_max_position_embeddings"),
    (rope("yarn", factor=4.0, rope_theta=1.0), "rope_theta is 1.0"),
    (rope("longrope", short_factor=[1.0] * 8, long_factor=[1.0] * 7), "long_factor.*list of 8"),
    (rope("longrope", short_factor=[1.0] * 7 + [0.0], long_factor=[1.0] * 8), "short_factor"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED, ids=lambda v: v if isinstance(v, str) else None)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"(?s).*config.json.*{message}"):
        read(tmp_path, changes)


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else None)
def test_a_wrong_value_is_named_with_its_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s).*config.json.*{message}"):
        read(tmp_path, changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=["empty", "cut", "utf16", "list", "null", "deep-list", "deep-object", "5000-digits"],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_architecture(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="1099511627776 bytes"):
        read_architecture(tmp_path)


def test_a_wrong_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": {"a": 1}}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id"):
        read(tmp_path, {})


JUNK = [None, True, -1, 0, 1, 10**30, 1e308, float("nan"), float("-inf"), "", "7", [], [None], {}, {"a": []}]
FIELDS = [
    *GOOD,
    *("rope_theta", "rope_scaling", "rope_parameters", "eos_token_id", "sliding_window", "use_sliding_window"),
    *("layer_types", "no_rope_layers", "no_rope_layer_interval", "rms_norm_eps", "tie_word_embeddings", "mlp_bias"),
    *("attention_bias", "hidden_act", "dtype", "torch_dtype", "auto_map", "quantization_config", "max_window_layers"),
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_junk_in_any_field_never_escapes_as_another_error(tmp_path: Path, family: str) -> None:
    refusals = []
    for field in FIELDS:
        for junk in JUNK:
            try:
                read(tmp_path, {"model_type": family, "architectures": None, field: junk})
            except ModelError as error:
                refusals.append(str(error))
    assert len(refusals) > len(FIELDS) * len(JUNK) // 3
    assert max(map(len, refusals)) < 1000


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
def test_junk_in_rope_parameters_never_escapes_as_another_error(tmp_path: Path, rope_type: str) -> None:
    good = {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "attention_factor": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": False,
        "mscale": 1.0,
        "rope_theta": 10000.0,
    }
    read(tmp_path, rope(rope_type, **good))
    refusals = []
    for field in good:
        for junk in JUNK:
            try:
                read(tmp_path, rope(rope_type, **(good | {field: junk})))
            except ModelError as error:
                refusals.append((field, str(error)))
    assert refusals
    assert all(field in message or "rope" in message for field, message in refusals)
