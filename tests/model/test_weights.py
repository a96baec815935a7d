"""safetensors -> Decoder: what is refused, in which words, and what is read past."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import checkpoint, load_decoder
from leanserve.contracts.errors import CheckpointError
from leanserve.distributed.ranks import Ranks
from leanserve.model import weights
from leanserve.model.architecture import read_architecture
from leanserve.model.decoder import Decoder
from leanserve.model.layers import Linear
from leanserve.model.partition import WeightSplit
from leanserve.model.weights import load_weights

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


class CountedFile:
    """An open safetensors file that counts the bytes it hands out."""

    read_bytes = 0

    def __init__(self, file: Any) -> None:
        self._file = file

    def keys(self) -> Any:
        return self._file.keys()

    def get_slice(self, name: str) -> Any:
        header = self._file.get_slice(name)

        class CountedSlice:
            get_shape, get_dtype = header.get_shape, header.get_dtype

            def __getitem__(self, part: Any) -> Tensor:
                tensor = header[part]
                CountedFile.read_bytes += tensor.nbytes
                return tensor

        return CountedSlice()


@pytest.mark.parametrize("split", ["replicated", "mlp", "all"])
def test_a_rank_reads_and_allocates_its_part_alone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, split: WeightSplit
) -> None:
    @contextmanager
    def counted_open(*args: Any, **kwargs: Any) -> Iterator[CountedFile]:
        with safe_open(*args, **kwargs) as file:
            yield CountedFile(file)

    monkeypatch.setattr(weights, "safe_open", counted_open)
    model_dir = checkpoint(tmp_path_factory, "qwen2", heads=7, kv_heads=1, hidden=63, max_shard_size="30KB")
    architecture = read_architecture(model_dir)
    stored = {name: t for file in model_dir.glob("*.safetensors") for name, t in load_file(file).items()}
    places: list[dict[str, Tensor]] = []
    for rank in range(3):
        cpu = torch.device("cpu")
        ranks = Ranks(rank=rank, size=3, device=cpu, group=None, stages_through_host=False)  # loading is no collective
        decoder = Decoder(architecture, ranks=ranks, split=split)
        CountedFile.read_bytes = 0
        calls: list[tuple[int, int]] = []
        load_weights(decoder, model_dir, progress=lambda *call, calls=calls: calls.append(call))
        held_bytes = 4 * decoder.partition.num_parameters
        assert CountedFile.read_bytes == held_bytes
        assert calls[-1] == (held_bytes, held_bytes)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in all_tensors(decoder)}
        assert sum(storages.values()) == held_bytes
        places.append(decoder.checkpoint_tensors())
        for name, part in decoder.partition.tensor_parts().items():
            mine = stored[name][tuple(slice(extent.start, extent.stop) for extent in part)]
            torch.testing.assert_close(places[rank][name], mine, rtol=0, atol=0)
    if split == "replicated":
        assert held_bytes == 4 * architecture.num_parameters
    else:
        assert sum(t["model.layers.0.mlp.down_proj.weight"].shape[1] for t in places) == architecture.intermediate_size


def all_tensors(decoder: Decoder) -> list[Tensor]:
    """Every weight that a decoder has allocated, whether a checkpoint has a name for it or not."""
    found = [decoder.embedding_VC, decoder.final_norm_C]
    for layer in decoder.layers:
        for value in vars(layer).values():
            found += [value] if isinstance(value, Tensor) else []
            found += [value.weight_JC, value.bias_J] if isinstance(value, Linear) else []
    if decoder.unembedding is not None:
        found.append(decoder.unembedding.weight_JC)
    return [tensor for tensor in found if tensor is not None]


def test_a_tied_head_that_differs_is_seen_by_the_rank_that_holds_the_difference(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    model_dir = Path(shutil.copytree(checkpoint(tmp_path_factory, "qwen2", tied=True), tmp_path / "tied"))
    edit(model_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit(model_dir, lambda t: t["lm_head.weight"][-1].add_(1))
    for rank in (0, 1):
        ranks = Ranks(rank=rank, size=2, device=torch.device("cpu"), group=None, stages_through_host=False)
        decoder = Decoder(read_architecture(model_dir), ranks=ranks, split="mlp")
        if rank == 0:
            load_weights(decoder, model_dir)
        else:
            with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
                load_weights(decoder, model_dir)


def test_progress_counts_bytes_to_the_end(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    architecture = read_architecture(sharded)
    decoder = Decoder(architecture, dtype=torch.bfloat16)
    load_weights(decoder, sharded, progress=lambda done, total: calls.append((done, total)))
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
