"""What one event of a stream says, in the shapes of OpenAI, vLLM, SGLang, llama.cpp and TGI."""

from dataclasses import dataclass
from typing import Any

import orjson

__all__ = ["DONE", "StreamEvent", "Usage", "error_of", "read_event"]

DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Usage:
    """The server's own token counts; None where it does not tell."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    """Prompt tokens found in a prefix cache."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event. Several fields may be set; none is set for an event that says nothing of interest."""

    text: str = ""
    token_ids: list[int] | None = None
    """None where the server does not send them."""
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens it carries: as many as its ids, else one if it has text. An empty last chunk carries none."""
        if self.token_ids is not None:
            return len(self.token_ids)
        return 1 if self.text else 0


def read_event(data: bytes) -> StreamEvent:
    """Interpret an event's data, which is not [DONE]. What cannot be read becomes an event with an error."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError:
        return StreamEvent(error=f"not JSON: {data[:80]!r}")
    if not isinstance(body, dict):
        return StreamEvent(error=f"not an object: {data[:80]!r}")
    if (error := error_of(body)) is not None:
        return StreamEvent(error=error)
    choices = body.get("choices")
    usage = _usage(body)
    if choices:
        choice = choices[0]
        delta = choice.get("delta")
        return StreamEvent(
            text=(choice.get("text") or "") if delta is None else _delta_text(delta),
            token_ids=choice.get("token_ids"),
            finish_reason=choice.get("finish_reason"),
            usage=usage,
        )
    if choices is None and "content" in body:  # llama.cpp's own shape
        stopped = body.get("stop") is True
        reason = body.get("stop_type") or "stop"
        return StreamEvent(
            text=body["content"] or "",
            token_ids=body.get("tokens") or None,
            finish_reason=("length" if reason == "limit" else "stop") if stopped else None,
            usage=usage,
        )
    if isinstance(token := body.get("token"), dict):  # TGI's own shape
        details = body.get("details") or {}
        return StreamEvent(
            text=token.get("text") or "",
            token_ids=[token["id"]] if "id" in token else None,
            finish_reason=details.get("finish_reason") or ("stop" if body.get("generated_text") is not None else None),
            usage=_counts(details.get("input_length"), details.get("generated_tokens"), None),
        )
    return StreamEvent(usage=usage)


def error_of(body: dict[str, Any]) -> str | None:
    """The message of an error object, in the shapes servers use; None if it is none."""
    error = body.get("error")
    if isinstance(error, dict):
        return str(error.get("message") or error)
    if error:
        return str(error)
    if body.get("object") == "error" or ("detail" in body and "choices" not in body):
        return str(body.get("message") or body.get("detail"))
    return None


def _delta_text(delta: dict[str, Any]) -> str:
    """Everything that is generated text: the answer, its reasoning, and the arguments of calls."""
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        text += (function.get("name") or "") + (function.get("arguments") or "")
    return text


def _usage(body: dict[str, Any]) -> Usage | None:
    if isinstance(usage := body.get("usage"), dict):
        details = usage.get("prompt_tokens_details") or {}
        return _counts(usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens"))
    if body.get("stop") is True and "tokens_predicted" in body:
        return _counts(body.get("tokens_evaluated"), body["tokens_predicted"], None)
    return None


def _counts(prompt: int | None, completion: int | None, cached: int | None) -> Usage | None:
    return None if prompt is None and completion is None else Usage(prompt, completion, cached)
