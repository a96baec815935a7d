"""What the demo and the needle test need of HTTP: one model's name, and completions as they stream in."""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from leanserve.contracts.errors import ConfigError, EngineError

__all__ = ["Answer", "PageOwners", "ask", "served_model"]

_CONNECT_S = 3.0
_SILENT_S = 120.0
"""A stream is never silent for so long: the server sends comments."""


@dataclass(frozen=True)
class PageOwners:
    """Which rank holds each page of a prompt."""

    page_tokens: int
    ranks: tuple[int, ...]

    def of(self, start: int, end: int) -> tuple[int, ...]:
        """The ranks that hold tokens [start, end), each once, in order."""
        return tuple(dict.fromkeys(self.ranks[start // self.page_tokens : (end - 1) // self.page_tokens + 1]))


@dataclass(frozen=True)
class Answer:
    """A greedy completion and how it came."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the server remembered."""
    first_token_s: float
    decode_s: float
    """From the first token to the last one."""
    page_owners: PageOwners | None
    """None where the server does not tell."""

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed; None when there was but one token."""
        return (len(self.token_ids) - 1) / self.decode_s if len(self.token_ids) > 1 else None


def served_model(url: str) -> str | None:
    """The name of the model that the server at `url` serves; None when nobody answers there.

    Raises:
        ConfigError: what answers is no OpenAI-compatible server.
    """
    try:
        with closing(_connect(url, _CONNECT_S)) as connection:
            connection.request("GET", f"{urlsplit(url).path.rstrip('/')}/v1/models")
            response = connection.getresponse()
            content = response.read()
    except OSError:
        return None
    except http.client.HTTPException as error:
        raise ConfigError(f"what answers at {url} does not speak HTTP: {error!r}") from error
    try:
        return json.loads(content)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{url}/v1/models answers {response.status} and names no model") from None


def ask(url: str, prompt: str, max_tokens: int, on_progress: Callable[[int, int], None] | None = None) -> Answer:
    """Complete a prompt greedily.

    Args:
        on_progress: called with the prompt's tokens that are in the KV cache, and all of them, whenever more are. Only
            LeanServe and llama.cpp tell; other servers ignore the question or refuse it.

    Raises:
        EngineError: the server cannot be reached any more, refuses or fails; the message says what it said.
    """
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_page_owners": True,
    }
    if on_progress is not None:
        body["return_progress"] = True
    started = time.perf_counter()
    first_s = last_s = 0.0
    texts: list[str] = []
    token_ids: list[int] = []
    owners: PageOwners | None = None
    usage: dict[str, Any] = {}
    for event in _events(url, body):
        usage = event.get("usage") or usage
        if on_progress is not None and (progress := event.get("prompt_progress")):
            on_progress(progress["processed"], progress["total"])
        for choice in event.get("choices", ()):
            last_s = time.perf_counter() - started
            first_s = first_s or last_s
            texts.append(choice["text"])
            token_ids += choice.get("token_ids") or ()
            if told := choice.get("page_owners"):
                owners = PageOwners(told["page_tokens"], tuple(told["ranks"]))
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        text="".join(texts),
        token_ids=tuple(token_ids),
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=details.get("cached_tokens") or 0,
        first_token_s=first_s,
        decode_s=last_s - first_s,
        page_owners=owners,
    )


def _connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        return kinds[parts.scheme](parts.hostname or "", parts.port, timeout=timeout_s)
    except (KeyError, ValueError, http.client.InvalidURL):
        raise ConfigError(f"url is {url!r}; write it as http://127.0.0.1:8000") from None


def _events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, up to [DONE]."""
    path = f"{urlsplit(url).path.rstrip('/')}/v1/completions"
    with closing(_connect(url, _SILENT_S)) as connection:
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise EngineError(f"the server at {url} answered {response.status}: {_message(response.read())}")
            for line in response:
                content = line.strip().removeprefix(b"data: ")
                if content == line.strip():  # a comment, or the empty line behind an event
                    continue
                if content == b"[DONE]":
                    return
                event = json.loads(content)
                if "error" in event:
                    raise EngineError(f"the server at {url} gave up: {_message(content)}")
                yield event
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the connection to {url} broke: {error!r}") from error
    raise EngineError(f"the stream from {url} ended without [DONE]")


def _message(content: bytes) -> str:
    try:
        return json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return content[:200].decode(errors="replace")
