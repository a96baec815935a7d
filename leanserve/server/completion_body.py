"""Long bodies of /v1/completions without a long stop: what pydantic reads slowly and all at once is read apart.

A million token ids take pydantic 110 ms of one piece, and as Python's integers 32 MB; here each piece is short, and
they are never more than an array.
"""

import asyncio
from array import array
from collections.abc import Sequence
from typing import cast

import msgspec
import numpy as np

from leanserve.server.completion_request import CompletionRequest

__all__ = ["read_completion"]

_LONG_BYTES = 128 << 10
_BYTES_AT_ONCE = 512 << 10
_IN_A_LIST_OF_IDS = b"0123456789-, \t\r\n"
_STAND_IN = {True: msgspec.Raw(b"[0]"), False: msgspec.Raw(b'"."')}

_read_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_read_text = msgspec.json.Decoder(str).decode


async def read_completion(body: bytes) -> tuple[CompletionRequest, list[str] | list[Sequence[int]]]:
    """A request and its prompts. One long prompt is not in the request, which has a stand-in for it.

    Raises:
        RequestError: what is wrong with it.
    """
    found = await _long_prompt(body) if len(body) > _LONG_BYTES else None
    if found is None:
        request = CompletionRequest.parse(body)
        return request, request.prompts()
    prompt, fields = found
    return CompletionRequest.parse(fields), cast("list[str] | list[Sequence[int]]", [prompt])


async def _long_prompt(body: bytes) -> "tuple[str | array[int], bytes] | None":
    """A prompt that is one list of ids or one text, and the body without it. None: read it the ordinary way."""
    try:
        fields = _read_fields(body)  # the syntax of all of it is checked here
        await asyncio.sleep(0)
        raw = bytes(fields.get("prompt", b""))
        if raw[:1] == b'"':
            prompt = _read_text(raw)
        elif raw[:1] == b"[" and not raw.translate(None, _IN_A_LIST_OF_IDS).strip(b"[]") and raw.count(b"[") == 1:
            prompt = await _token_ids(raw[1:-1])
        else:
            return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # the ordinary way has better words for it
    await asyncio.sleep(0)
    if len(prompt) == 0:
        return None
    rest = msgspec.json.encode({**fields, "prompt": _STAND_IN[not isinstance(prompt, str)]})
    return prompt, rest


async def _token_ids(listed: bytes) -> "array[int]":
    """The numbers of a list whose syntax is right; what int64 cannot hold becomes its end, which is no token id."""
    numbers: array[int] = array("q")
    start = 0
    while start < len(listed):
        comma = listed.find(b",", start + _BYTES_AT_ONCE)
        end = comma if comma >= 0 else len(listed)
        numbers.frombytes(np.fromstring(listed[start:end], dtype=np.int64, sep=",").tobytes())
        start = end + 1
        await asyncio.sleep(0)
    return numbers
