"""The routes: what each accepts and answers. Status codes of errors are `server.errors`' business."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from leanserve import __version__
from leanserve.contracts.errors import EngineError, RequestError
from leanserve.server.completions import Completion, Piece
from leanserve.server.output_stream import OutputStream
from leanserve.server.protocol import CompletionRequest, DetokenizeRequest, ErrorBody, TokenizeRequest
from leanserve.server.serving import Serving, check_token_ids
from leanserve.server.sse import EventStream, completion_events

__all__ = ["build_router"]

_T = TypeVar("_T")


def build_router(serving: Serving) -> APIRouter:
    """All routes of one model."""
    router = APIRouter(
        responses={
            "4XX": {"model": ErrorBody, "description": "The request is wrong."},
            "5XX": {"model": ErrorBody, "description": "The server cannot answer, now or at all."},
        }
    )

    @router.post("/v1/completions", openapi_extra={"requestBody": CompletionRequest.openapi()})
    async def completions(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body = CompletionRequest.parse(await _json_body(request))
        serving.counts["unknown_fields"] += body.unknown_fields
        serving.check_model(body.model)
        sampling = body.sampling()
        info = serving.admit(1)
        prompts = await serving.prepare(body, sampling, info)
        serving.admit(len(prompts))  # again: tokenizing a long text takes a while
        completion = Completion(body, prompts, sampling, serving.tokenizer, body.model or serving.model_name)
        outputs = serving.client.open_stream()
        try:
            for prompt, request_id in zip(prompts, completion.choices, strict=True):
                outputs.submit(request_id, prompt.token_ids, sampling)
            if body.stream:
                events = completion_events(completion, outputs, serving.settings.keep_alive_s)
                return EventStream(events, outputs, serving.counts)
            return _json(await _unless_disconnected(request, _collect(completion, outputs)))
        except BaseException:
            outputs.abort()
            raise

    @router.post("/tokenize", openapi_extra={"requestBody": TokenizeRequest.openapi()})
    async def tokenize(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body = TokenizeRequest.parse(await _json_body(request))
        serving.check_model(body.model)
        special = body.add_special_tokens is not False
        token_ids = await asyncio.to_thread(serving.text_tokenizer().encode, body.prompt, add_special_tokens=special)
        limit = serving.client.info.max_context_tokens if serving.client.info else None
        return _json({"count": len(token_ids), "max_model_len": limit, "tokens": token_ids})

    @router.post("/detokenize", openapi_extra={"requestBody": DetokenizeRequest.openapi()})
    async def detokenize(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body = DetokenizeRequest.parse(await _json_body(request))
        serving.check_model(body.model)
        tokenizer = serving.text_tokenizer()
        check_token_ids(body.tokens, tokenizer.vocab_size, "tokens")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return _json({"prompt": text})

    @router.get("/v1/models")
    async def models() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json({"object": "list", "data": [_model_card(serving, name) for name in serving.settings.model_names]})

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        serving.check_model(model_id)
        return _json(_model_card(serving, model_id))

    @router.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        client = serving.client
        if client.state == "failed":
            client.check_ready()
        trouble = client.trouble()
        if trouble is not None:
            raise EngineError(trouble)
        return _json(
            {
                "status": "ok",
                "state": client.state,
                "running": client.load.running,
                "waiting": client.load.waiting,
                "live_requests": client.live_requests,
                "silent_s": round(client.silent_s, 3),
                "pages_used_per_rank": client.load.pages_used_per_rank,
                "ranks": client.health.report(time.monotonic()),
            }
        )

    @router.get("/ready")
    async def ready() -> Response:  # pyright: ignore[reportUnusedFunction]
        serving.check_serving()
        return _json({"status": "ready"})

    @router.get("/ping")
    async def ping() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json({})

    @router.get("/version")
    async def version() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json({"version": __version__})

    return router


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def _model_card(serving: Serving, name: str) -> dict[str, object]:
    info = serving.client.info
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "leanserve",
        "root": serving.model_name,
        "max_model_len": info.max_context_tokens if info else None,
    }


async def _json_body(request: Request) -> bytes:
    """The body, if it is declared to be JSON. Browsers ask before they send that across sites, and nothing else."""
    declared = request.headers.get("content-type", "")
    if declared.split(";")[0].strip().lower() != "application/json":
        raise RequestError(
            "the content-type header must be application/json (curl: -H 'content-type: application/json')",
            code="invalid_content_type",
        )
    return await request.body()


async def _collect(completion: Completion, outputs: OutputStream) -> dict[str, object]:
    """Wait for all choices to end."""
    pieces: list[Piece] = []
    while not outputs.finished:
        output = await outputs.next()
        if output is None:
            continue
        choice = completion.choices[output.request_id]
        pieces.extend(choice.pieces(output))
        if choice.finish_reason is not None:
            outputs.abort(choice.request_id)
    return completion.whole(pieces)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled when the client goes away first.

    Raises:
        ClientDisconnect: it went away.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    watching = asyncio.create_task(disconnect())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
