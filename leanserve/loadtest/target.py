"""The server under test: its model, its limit, and the useful extra fields it takes; asked before the clock starts."""

from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.events import error_of
from leanserve.loadtest.http_stream import Address, TransportError, fetch
from leanserve.loadtest.prompts import Prompt

__all__ = ["Endpoint", "Target", "find_target"]

Endpoint = Literal["completions", "chat"]

_EXTRAS: dict[str, Any] = {"return_token_ids": True, "cache_salt": "probe", "ignore_eos": True}
"""Beyond OpenAI's fields; given up in this order where a server refuses a request with them.

return_token_ids: how many tokens a chunk carries, and answers compared by token (vLLM, LeanServe).
cache_salt: nothing cached by an earlier run counts (vLLM, LeanServe).
ignore_eos: outputs have the length asked for (most servers)."""


@dataclass(frozen=True)
class Target:
    """A server that answers, and how to ask it."""

    address: Address
    endpoint: Endpoint
    model: str
    limit_tokens: int | None
    """Prompt and output together; None where the server does not say."""
    extras: frozenset[str]
    fields: dict[str, Any] = field(default_factory=dict)
    """Merged into every body, over everything else."""

    @property
    def route(self) -> str:
        return "/v1/completions" if self.endpoint == "completions" else "/v1/chat/completions"

    def body(self, prompt: Prompt, output_tokens: int, *, cache_salt: str, stops_itself: bool = False) -> bytes:
        """One request as it goes on the wire. stops_itself: the model may end before `output_tokens`."""
        options: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if "return_token_ids" in self.extras:
            options["return_token_ids"] = True
        if "cache_salt" in self.extras:
            options["cache_salt"] = cache_salt
        if "ignore_eos" in self.extras and not stops_itself:
            options["ignore_eos"] = True
        rest = orjson.dumps(options | self.fields)[1:]
        if self.endpoint == "chat":
            return b'{"messages":[{"role":"user","content":"' + prompt.fragment + b'"}],' + rest
        if prompt.kind == "text":
            return b'{"prompt":"' + prompt.fragment + b'",' + rest
        return b'{"prompt":[' + prompt.fragment + b"]," + rest


async def find_target(
    address: Address,
    endpoint: Endpoint,
    example: Prompt,
    *,
    model: str | None = None,
    limit_tokens: int | None = None,
    fields: dict[str, Any] | None = None,
) -> Target:
    """Ask for the model list, then send one short request, leaving out extra fields until it is accepted.

    Raises:
        ConfigError: nobody answers, there is no such model, or even the plain request is refused.
    """
    if endpoint == "chat" and example.kind == "ids":
        raise ConfigError("--endpoint chat takes text only; add --prompts text")
    card = await _model_card(address, model)
    found_limit = limit_tokens or await _limit(address, card)
    extras = set(_EXTRAS)
    while True:
        target = Target(address, endpoint, str(card["id"]), found_limit, frozenset(extras), fields or {})
        status, answer = await _ask(target, target.body(example, 1, cache_salt=_EXTRAS["cache_salt"]))
        if status == 200:
            return target
        named = [name for name in extras if name in answer]
        given_up = (named or [name for name in _EXTRAS if name in extras])[:1]
        if status not in (400, 422) or not given_up:
            kind = "token ids" if example.kind == "ids" else "a text"
            advice = "; try --prompts text" if example.kind == "ids" and status in (400, 422) else ""
            raise ConfigError(
                f"{address.url}{target.route} answers {status} to a first request with {kind}: {answer[:500]}{advice}"
            )
        extras -= set(given_up)


async def _ask(target: Target, body: bytes) -> tuple[int, str]:
    try:
        status, content = await fetch(target.address, "POST", target.route, body, timeout_s=120)
    except TransportError as error:
        raise ConfigError(f"the first request to {target.address.url} failed: {error}") from None
    try:
        message = error_of(orjson.loads(content)) or content.decode(errors="replace")
    except (orjson.JSONDecodeError, AttributeError):
        message = content.decode(errors="replace")
    return status, message


async def _model_card(address: Address, model: str | None) -> dict[str, Any]:
    try:
        status, content = await fetch(address, "GET", "/v1/models")
    except TransportError as error:
        raise ConfigError(f"no server at {address.url}: {error}; start one, or check the URL") from None
    if status in (401, 403):
        raise ConfigError(f"{address.url} wants a key (status {status}); give it with --api-key or LEANSERVE_API_KEY")
    try:
        cards = orjson.loads(content)["data"] if status == 200 else []
        names = [card["id"] for card in cards]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        cards, names = [], []
    if model is None:
        if not cards:
            raise ConfigError(f"{address.url}/v1/models lists no model (status {status}); name one with --model")
        return cards[0]
    # A server may serve more than it lists (aliases, adapters): the first request will tell.
    return cards[names.index(model)] if model in names else {"id": model}


async def _limit(address: Address, card: dict[str, Any]) -> int | None:
    """vLLM, SGLang and LeanServe list max_model_len; llama.cpp and TGI tell theirs elsewhere."""
    if isinstance(found := card.get("max_model_len"), int):
        return found
    for path, keys in (("/props", ("default_generation_settings", "n_ctx")), ("/info", ("max_total_tokens",))):
        try:
            status, content = await fetch(address, "GET", path, timeout_s=5)
            value: Any = orjson.loads(content) if status == 200 else None
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
        except (TransportError, orjson.JSONDecodeError):
            continue
        if isinstance(value, int):
            return value
    return None
