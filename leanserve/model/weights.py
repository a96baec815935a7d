"""Weights from safetensors files into a Decoder. Each tensor is checked before any is read, and copied once.

Files are mapped, not read into memory: the copy goes from the page cache into the model's own dtype and device, so
loading needs the model's memory and not twice that. A rank that holds a part of a matrix touches that part alone.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from leanserve.contracts.errors import CheckpointError
from leanserve.model.checkpoint import find_shards
from leanserve.model.decoder import Decoder

__all__ = ["Progress", "load_weights"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total), from (0, total) to (total, total)."""

_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_HEAD = "lm_head.weight"
_ROTARY_BUFFER = ".rotary_emb.inv_freq"  # old exports hold it; it is computed from config.json


def load_weights(decoder: Decoder, model_dir: Path, *, progress: Progress | None = None) -> None:
    """Fill a Decoder from a checkpoint directory, then pack it for the CPU it is on.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or of a type that is not read; or a file is
            corrupt. Names, shapes and types of all files are checked before anything is copied.
    """
    with ExitStack() as stack:
        stored = _stored_tensors(find_shards(model_dir), stack)
        expected = decoder.architecture.tensor_shapes()
        _check_names(expected, stored, model_dir, tied=decoder.architecture.tied_embeddings)
        for name, shape in expected.items():
            _check_tensor(name, shape, stored[name])

        targets, parts = decoder.checkpoint_tensors(), decoder.partition.tensor_parts()
        total = sum(stored[name].num_bytes(part) for name, part in parts.items())
        done = 0
        if progress is not None:
            progress(done, total)
        for name, part in parts.items():
            if targets[name].numel():
                targets[name].copy_(stored[name].read(part))
            done += stored[name].num_bytes(part)
            if progress is not None:
                progress(done, total)
        if decoder.architecture.tied_embeddings and _HEAD in stored:
            _check_tied(decoder, stored[_HEAD])
    decoder.pack()


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in an open safetensors file."""

    name: str
    path: Path
    file: Any
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, ..."""

    def num_bytes(self, part: tuple[range, ...]) -> int:
        return math.prod(map(len, part)) * _BYTES[self.dtype]

    def read(self, part: tuple[range, ...]) -> Tensor:
        """The values of a part, given as a range per dimension, on the CPU, in the file's dtype."""
        try:
            return self.file.get_slice(self.name)[tuple(slice(extent.start, extent.stop) for extent in part)]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: tensor {self.name} cannot be read ({error})") from error


def _stored_tensors(paths: list[Path], stack: ExitStack) -> dict[str, _StoredTensor]:
    """Open the files, which reads their headers only."""
    stored: dict[str, _StoredTensor] = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                if name in stored:
                    raise CheckpointError(f"{path}: tensor {name} is in {stored[name].path.name} too")
                header = file.get_slice(name)
                stored[name] = _StoredTensor(name, path, file, tuple(header.get_shape()), header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); download it again") from error
    return stored


def _check_names(
    expected: dict[str, tuple[int, ...]], stored: dict[str, _StoredTensor], model_dir: Path, *, tied: bool
) -> None:
    if missing := [name for name in expected if name not in stored]:
        raise CheckpointError(
            f"{model_dir}: {len(missing)} of {len(expected)} tensors are missing: {_some(missing)}. config.json and "
            "the weights do not belong together, or the download is incomplete"
        )
    ignored = {_HEAD} if tied else set()
    unexpected = [n for n in stored if n not in expected and n not in ignored and not n.endswith(_ROTARY_BUFFER)]
    if unexpected:
        raise CheckpointError(
            f"{model_dir}: {len(unexpected)} tensors have no place in the model that config.json describes: "
            f"{_some(unexpected)}. Leaving them out would change its answers"
        )


def _check_tensor(name: str, shape: tuple[int, ...], tensor: _StoredTensor) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}; config.json makes it {list(shape)}"
        )
    if tensor.dtype not in _BYTES:
        raise CheckpointError(f"{tensor.path}: tensor {name} is {tensor.dtype}; {', '.join(_BYTES)} are read")


def _check_tied(decoder: Decoder, head: _StoredTensor) -> None:
    """A file that says "tied" and still holds another output matrix contradicts itself."""
    shape = (decoder.architecture.vocab_size, decoder.architecture.hidden_size)
    _check_tensor(_HEAD, shape, head)
    part = decoder.partition.tensor_parts()["model.embed_tokens.weight"]
    if not torch.equal(head.read(part).to(decoder.dtype), decoder.embedding_VC.cpu()):
        raise CheckpointError(
            f"{head.path}: {_HEAD} differs from model.embed_tokens.weight, but config.json ties them; set "
            "tie_word_embeddings to false to use it"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
