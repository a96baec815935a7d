"""safetensors -> Decoder: what is refused, in which words, and what is read past."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import checkpoint
from leanserve.contracts.errors import CheckpointError
from leanserve.model.architecture import read_architecture
from leanserve.model.decoder import Decoder
from leanserve.model.weights import load_decoder, load_weights

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def single(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A writable copy of a checkpoint in one file."""
    return Path(shutil.copytree(checkpoint(tmp_path_factory, "qwen3"), tmp_path / "single"))


@pytest.fixture
def sharded(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A writable copy of the same checkpoint in many files."""
    return Path(shutil.copytree(checkpoint(tmp_path_factory, "qwen3", max_shard_size="30KB"), tmp_path / "sharded"))


def edit(model_dir: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, model_dir / "model.safetensors")


def test_every_tensor_arrives_where_it_belongs(single: Path, sharded: Path) -> None:
    stored = load_file(single / "model.safetensors")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for model_dir in (single, sharded):
        decoder = Decoder(read_architecture(model_dir))
        load_weights(decoder, model_dir)
        places = decoder.checkpoint_tensors()
        assert places.keys() == stored.keys()
        for name, place in places.items():
            torch.testing.assert_close(place, stored[name].expand_as(place), rtol=0, atol=0)


def test_progress_counts_bytes_to_the_end(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    architecture = read_architecture(sharded)
    decoder = load_decoder(
        sharded,
        architecture=architecture,
        dtype=torch.bfloat16,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert decoder.architecture is architecture
    total = 4 * architecture.num_parameters
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) == len(architecture.tensor_shapes()) + 1


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(Q), f"1 of .* tensors are missing: {Q}"),
    "many-missing": (lambda t: [t.pop(n) for n in list(t) if "mlp" in n], r"9 of .* missing: .*, \.\.\."),
    "no-head": (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
    "transposed": (lambda t: t.update({Q: t[Q].T.contiguous()}), rf"{Q} has shape \[60, 96\].*makes it \[96, 60\]"),
    "one-head-short": (lambda t: t.update({Q: t[Q][:80].clone()}), rf"{Q} has shape \[80, 60\]"),
    "flat": (lambda t: t.update({Q: t[Q].flatten()}), rf"{Q} has shape \[5760\]"),
    "bias-without-a-place": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}),
        "1 tensors have no place.*layers.0.self_attn.q_proj.bias",
    ),
    "layer-too-many": (
        lambda t: t.update({n.replace("layers.2", "layers.3"): v.clone() for n, v in t.items() if "layers.2" in n}),
        "11 tensors have no place.*layers.3",
    ),
    "integers": (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} is I8; F32, BF16, F16 are read"),
    "float64": (lambda t: t.update({Q: t[Q].double()}), f"{Q} is F64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_named(single: Path, case: str) -> None:
    change, message = WRONG[case]
    edit(single, change)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(single)


def test_nothing_is_copied_when_a_tensor_does_not_fit(single: Path) -> None:
    edit(single, lambda t: t.update({Q: t[Q].flatten()}))
    decoder = Decoder(read_architecture(single))
    before = [place.zero_() for place in decoder.checkpoint_tensors().values()]
    with pytest.raises(CheckpointError):
        load_weights(decoder, single)
    assert all(not place.any() for place in before)


@pytest.mark.parametrize("kept_bytes", [0, 5, 8, 200, -1])
def test_a_truncated_file(single: Path, kept_bytes: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: not a readable safetensors file.*download it again"
    ):
        load_decoder(single)


def test_a_header_that_lies(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_decoder(single)


def test_a_pickle_under_a_safetensors_name(single: Path) -> None:
    torch.save({"a": torch.zeros(3)}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_decoder(single)


def test_the_same_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)
    with pytest.raises(CheckpointError, match=f"tensor {name} is in {first.name} too"):
        load_decoder(sharded)


def test_a_tensor_that_the_index_promises_and_no_shard_has(sharded: Path) -> None:
    shard = next(path for path in sorted(sharded.glob("model-*.safetensors")) if Q in load_file(path))
    tensors = load_file(shard)
    del tensors[Q]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=f"missing: {Q}"):
        load_decoder(sharded)


def test_old_rotary_buffers_are_read_past(single: Path) -> None:
    edit(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_decoder(single)


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    model_dir = Path(shutil.copytree(checkpoint(tmp_path_factory, "qwen2", tied=True), tmp_path / "tied"))
    edit(model_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_decoder(model_dir).unembedding is None

    edit(model_dir, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs.*tie_word_embeddings to false"):
        load_decoder(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert load_decoder(model_dir).unembedding is not None
