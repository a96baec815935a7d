"""Where a checkpoint's files are: a local directory or a Hugging Face hub id, one safetensors file or many. No torch.

Only configuration, tokenizer and safetensors files are ever fetched or opened. Pickled weights (.bin, .pt) can run code
when they are read, so they are refused.
"""

import os
import re
from pathlib import Path

from leanserve.contracts.errors import CheckpointError, ModelError
from leanserve.model.architecture import read_architecture
from leanserve.model.config_json import JsonFile, shown

__all__ = ["find_shards", "resolve_config", "resolve_model"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_CONFIG_PATTERNS = ["config.json", "generation_config.json"]
_TOKENIZER_PATTERNS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
]
_WEIGHT_PATTERNS = [SINGLE_FILE, INDEX_FILE, "model-*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def resolve_model(name_or_path: str | Path) -> Path:
    """The local directory of a model, downloaded first where a hub id is given.

    config.json is fetched and read before the weights, so an unsupported model is refused before gigabytes arrive.

    Args:
        name_or_path: an existing directory, or a hub id such as `Qwen/Qwen3-0.6B`. A directory wins over a hub id.

    Raises:
        UnsupportedModelError: the model's config.json names something that is not supported.
        CheckpointError: no such directory, or one without config.json or safetensors weights.
        ModelError: the hub does not have the model, will not give it, or cannot be reached.
    """
    path = _local_directory(name_or_path)
    if path is not None:
        find_shards(path)
        return path
    repo = str(name_or_path)
    read_architecture(_fetch(repo, _CONFIG_PATTERNS))
    model_dir = _fetch(repo, _CONFIG_PATTERNS + _TOKENIZER_PATTERNS + _WEIGHT_PATTERNS)
    find_shards(model_dir)
    return model_dir


def resolve_config(name_or_path: str | Path) -> Path:
    """A local directory that holds a model's config.json, fetched alone where a hub id is given.

    Raises:
        CheckpointError, ModelError: as `resolve_model`; weights are not asked for.
    """
    path = _local_directory(name_or_path)
    return _fetch(str(name_or_path), _CONFIG_PATTERNS) if path is None else path


def _local_directory(name_or_path: str | Path) -> Path | None:
    """The directory that is named; None for what can only be a hub id.

    Raises:
        CheckpointError: neither.
    """
    text = str(name_or_path)
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the checkpoint's directory, which holds its config.json")
    if (
        isinstance(name_or_path, Path)
        or not _HUB_ID.fullmatch(text)
        or text.endswith((".json", ".safetensors", ".gguf"))
    ):
        raise CheckpointError(f"{path}: no such directory, and not a Hugging Face hub id (owner/name) either")
    return None


def find_shards(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory. model.safetensors wins over an index, as in transformers.

    Raises:
        CheckpointError: no config.json; no safetensors weights; an index that cannot be read, that names a file outside
            the directory, or a shard that is not there.
    """
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{model_dir}: no config.json; a Hugging Face checkpoint directory has one")
    if (model_dir / SINGLE_FILE).is_file():
        return [model_dir / SINGLE_FILE]
    index_path = model_dir / INDEX_FILE
    if not index_path.is_file():
        others = sorted(
            file.name for file in model_dir.iterdir() if file.suffix in (*_PICKLED, ".gguf", ".safetensors")
        )
        seen = f"it has {', '.join(others[:5])}" if others else "it has no weights"
        raise CheckpointError(
            f"{model_dir}: no {SINGLE_FILE} and no {INDEX_FILE} ({seen}); only these safetensors layouts are read, "
            "since pickled weights can run code. transformers' save_pretrained writes them"
        )
    weight_map = JsonFile.read(index_path).table("weight_map")
    if weight_map is None:
        raise CheckpointError(f"{index_path}: no weight_map, which says which file holds each tensor")
    for tensor, file in weight_map.values.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{index_path}: weight_map puts {shown(tensor)} into {shown(file)}; it must be a .safetensors file "
                "in the same directory"
            )
    shards = [model_dir / file for file in sorted(set(weight_map.values.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{model_dir}: {len(missing)} of {len(shards)} weight files are missing, the first is {missing[0]}; the "
            "download may be incomplete"
        )
    return shards


def _fetch(repo: str, patterns: list[str]) -> Path:
    """Those files of a hub repository, from the local cache or the hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: accept its licence on https://huggingface.co/{repo} and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo}: neither a local directory nor a public model on the Hugging Face hub; check the spelling, or "
            "log in with `hf auth login` if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{repo}: no such local directory, and the Hugging Face hub cannot be reached and has no copy in the "
            "local cache. Give the path of a checkpoint directory, or connect (is HF_HUB_OFFLINE set?)"
        ) from error
    except Exception as error:  # the client lets its HTTP library's errors through, and it has changed that library
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{repo}: the Hugging Face hub did not give the model ({reason})") from error
