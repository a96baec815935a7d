"""A generation route's way from a prepared answer to an HTTP response, streamed or whole."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request
from starlette.responses import Response

from leanserve.contracts.errors import RequestError
from leanserve.server.answer import Answer
from leanserve.server.middleware import ClientLeft
from leanserve.server.output_stream import OutputStream
from leanserve.server.request_facts import facts_of
from leanserve.server.serving import Serving
from leanserve.server.sse import EventStream

__all__ = ["json_body", "json_response", "respond"]

logger = logging.getLogger("leanserve.server")

_T = TypeVar("_T")


def json_response(content: object) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


async def json_body(request: Request) -> bytes:
    """The body, if it is declared to be JSON. Browsers ask before they send that across sites, and nothing else."""
    declared = request.headers.get("content-type", "")
    if declared.split(";")[0].strip().lower() != "application/json":
        raise RequestError(
            "the content-type header must be application/json (curl: -H 'content-type: application/json')",
            code="invalid_content_type",
        )
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise RequestError(
            f"the content-encoding header is {coding[:50]!r}; send the JSON uncompressed", code="invalid_content_type"
        )
    return await request.body()


async def respond(request: Request, serving: Serving, answer: Answer) -> Response:
    """Submit an answer's choices to the engine, and answer as they grow or when all have ended.

    Raises:
        OverloadedError: the server is loading, draining or full.
        EngineError: the engine is gone, or failed before a stream began.
        DeadlineError: the request waited, or took, too long.
        ClientLeft: the client went away before the whole answer was there.
    """
    serving.admit(len(answer.choices), answer.prompt_tokens)  # again: tokenizing a long text takes a while
    facts = facts_of(request.scope)
    facts.answer = answer
    extra = {"event": "request_admitted", "request_id": facts.request_id, "answer_id": answer.id}
    logger.debug("request %s is %s: %d prompt tokens", facts.request_id, answer.id, answer.prompt_tokens, extra=extra)
    outputs = serving.client.open_stream(arrived_at=facts.arrived_at)
    facts.times = outputs.times
    try:
        for choice in answer.choices.values():
            outputs.submit(choice.request_id, choice.prompt.token_ids, choice.sampling)
        settings = serving.settings
        outputs.limit(settings.queue_timeout_s, settings.request_timeout_s)
        if answer.streams:
            if settings.queue_timeout_s is not None:  # a deadline has a status of its own, while there is none yet
                await _unless_disconnected(request, outputs, outputs.begun(settings.keep_alive_s))
            return EventStream(answer, outputs, settings.keep_alive_s, serving.counts)
        return await _unless_disconnected(request, outputs, _whole(answer, outputs))
    except BaseException:
        outputs.abort()
        raise


async def _whole(answer: Answer, outputs: OutputStream) -> Response:
    """Wait for all choices to end."""
    pieces = [piece async for piece in answer.read(outputs) if piece is not None]
    if any(choice.prompt_logprobs for choice in answer.choices.values()):  # many numbers to write
        return await asyncio.to_thread(lambda: json_response(answer.whole(pieces)))
    return json_response(answer.whole(pieces))


async def _unless_disconnected(request: Request, outputs: OutputStream, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled when the client goes away first.

    Raises:
        ClientLeft: it went away.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    watching = asyncio.create_task(disconnect())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft(outputs.phase)
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
