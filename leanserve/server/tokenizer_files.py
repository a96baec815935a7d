"""The JSON files beside a checkpoint's tokenizer.json: tokenizer_config.json and special_tokens_map.json."""

import json
from pathlib import Path
from typing import Any, cast

from leanserve.contracts.errors import CheckpointError

__all__ = ["read_tokenizer_file"]


def read_tokenizer_file(path: Path) -> dict[str, Any]:
    """Its object; empty where there is no such file.

    Raises:
        CheckpointError: it cannot be read, is not JSON, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; it must hold an object")
    return cast("dict[str, Any]", content)
