"""A recorded workload: one JSON object a line, with when each request came and how long it was.

    {"timestamp_s": 0.25, "prompt_tokens": 4096, "output_tokens": 64}

Mooncake's published traces are read too: `timestamp` in milliseconds, `input_length`, `output_length`, and `hash_ids`,
where equal ids stand for equal blocks of 512 tokens, so that shared beginnings stay shared.
"""

from pathlib import Path
from typing import Any

import orjson

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.prompts import Prompt, TokenRange, ids_prompt
from leanserve.loadtest.workload import Conversation, Turn

__all__ = ["read_trace"]

HASHED_BLOCK_TOKENS = 512


def read_trace(path: Path, seed: int, ids: TokenRange, *, limit: int | None = None) -> tuple[Conversation, ...]:
    """The trace's requests, at most `limit`, in order of time; the first one starts at 0.

    Raises:
        ConfigError: the file cannot be read, or a line does not say what it must; with the line's number.
    """
    found: list[tuple[float, Prompt, int]] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(found) < limit):
            try:
                found.append(_read_line(orjson.loads(line), f"trace/{seed}/{number}", seed, ids))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"--trace {path}, line {number}: {error!r}; expected timestamp_s, prompt_tokens and output_tokens, "
                    "or Mooncake's timestamp, input_length, output_length and hash_ids"
                ) from None
    if not found:
        raise ConfigError(f"--trace {path}: no request in it")
    found.sort(key=lambda item: item[0])
    first_s = found[0][0]
    return tuple(
        Conversation((Turn(index=index, prompt=prompt, output_tokens=output_tokens),), start_s - first_s)
        for index, (start_s, prompt, output_tokens) in enumerate(found)
    )


def _read_line(line: dict[str, Any], key: str, seed: int, ids: TokenRange) -> tuple[float, Prompt, int]:
    if "timestamp_s" in line:
        start_s, tokens, output_tokens = line["timestamp_s"], line["prompt_tokens"], line["output_tokens"]
        blocks: list[int] = []
    else:
        start_s, tokens, output_tokens = line["timestamp"] / 1000, line["input_length"], line["output_length"]
        blocks = line.get("hash_ids", [])
    for name, value in (("prompt", tokens), ("output", output_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{value!r} {name} tokens")
    prompt = Prompt("ids", b"", 0)
    for block in blocks:
        if prompt.tokens < tokens:
            size = min(HASHED_BLOCK_TOKENS, tokens - prompt.tokens)
            # Drawn whole and then cut, so that a block is the same tokens wherever it stands.
            prompt += _cut(ids_prompt(HASHED_BLOCK_TOKENS, f"block/{seed}/{block}", ids), size)
    if prompt.tokens < tokens:
        prompt += ids_prompt(tokens - prompt.tokens, key, ids)
    return float(start_s), prompt, output_tokens


def _cut(prompt: Prompt, tokens: int) -> Prompt:
    return Prompt("ids", b",".join(prompt.fragment.split(b",")[:tokens]), tokens)
