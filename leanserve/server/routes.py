"""The routes: what each accepts and answers. Status codes of errors are `server.errors`' business."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from leanserve import __version__
from leanserve.contracts.errors import EngineError
from leanserve.server.chat import prepare_chat
from leanserve.server.chat_request import ChatRequest, TokenizeRequest
from leanserve.server.completion_body import read_completion
from leanserve.server.completion_request import CompletionRequest
from leanserve.server.completions import Completion
from leanserve.server.prompt_intake import check_token_ids
from leanserve.server.protocol import DetokenizeRequest, ErrorBody
from leanserve.server.respond import json_body, json_response, respond
from leanserve.server.serving import Serving

__all__ = ["build_router"]

_Endpoint = Callable[..., Awaitable[Response]]


def build_router(serving: Serving) -> APIRouter:
    """All routes of one model."""
    router = APIRouter(
        responses={
            "4XX": {"model": ErrorBody, "description": "The request is wrong."},
            "5XX": {"model": ErrorBody, "description": "The server cannot answer, now or at all."},
        }
    )

    def get(path: str, **options: Any) -> Callable[[_Endpoint], _Endpoint]:
        """A route for GET, and for HEAD, which monitors and load balancers send."""

        def add(endpoint: _Endpoint) -> _Endpoint:
            router.add_api_route(path, endpoint, methods=["GET"], **options)
            router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
            return endpoint

        return add

    @router.post("/v1/completions", openapi_extra={"requestBody": CompletionRequest.openapi()})
    async def completions(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body, given = await read_completion(await json_body(request))
        serving.counts.unknown_fields += body.unknown_fields
        serving.check_model(body.model)
        sampling = body.sampling()
        info = serving.admit(sampling.n)
        prompts = await serving.prompts.prepare(given, body, sampling, info, keeps_text=bool(body.echo))
        name = body.model or serving.model_name
        answer = Completion(body, prompts, sampling, serving.prompts.tokenizer, name, info.page_tokens)
        return await respond(request, serving, answer)

    @router.post("/v1/chat/completions", openapi_extra={"requestBody": ChatRequest.openapi()})
    async def chat(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body = ChatRequest.parse(await json_body(request))
        serving.counts.unknown_fields += body.unknown_fields
        serving.check_model(body.model)
        answer = await prepare_chat(serving, body)
        return await respond(request, serving, answer)

    @router.post("/tokenize", openapi_extra={"requestBody": TokenizeRequest.openapi()})
    async def tokenize(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body = TokenizeRequest.parse(await json_body(request))
        serving.check_model(body.model)
        text = body.prompt if body.messages is None else await serving.render(body.messages, body)
        [token_ids] = await serving.prompts.encode([text or ""], add_special_tokens=body.adds_special_tokens)
        info = serving.client.engine.info
        limit = None if info is None else info.max_context_tokens
        tokens = np.frombuffer(token_ids, dtype=np.int32)
        return json_response({"count": len(token_ids), "max_model_len": limit, "tokens": tokens})

    @router.post("/detokenize", openapi_extra={"requestBody": DetokenizeRequest.openapi()})
    async def detokenize(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body = DetokenizeRequest.parse(await json_body(request))
        serving.check_model(body.model)
        tokenizer = serving.prompts.text_tokenizer()
        check_token_ids(body.tokens, tokenizer.vocab_size, "tokens")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    @get("/v1/models")
    async def models() -> Response:  # pyright: ignore[reportUnusedFunction]
        return json_response(
            {"object": "list", "data": [_model_card(serving, name) for name in serving.settings.model_names]}
        )

    @get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        serving.check_model(model_id)
        return json_response(_model_card(serving, model_id))

    @get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        client, engine = serving.client, serving.client.engine
        if engine.state == "failed":
            engine.check_ready()
        trouble = client.trouble()
        if trouble is not None:
            raise EngineError(trouble)
        return json_response(
            {
                "status": "ok",
                "state": engine.state,
                "running": engine.load.running,
                "waiting": engine.load.waiting,
                "live_requests": client.live_requests,
                "silent_s": round(client.silent_s, 3),
                "pages_used_per_rank": engine.load.pages_used_per_rank,
                "ranks": client.health.report(time.monotonic()),
            }
        )

    @get("/ready")
    async def ready() -> Response:  # pyright: ignore[reportUnusedFunction]
        serving.check_serving()
        return json_response({"status": "ready"})

    @get("/metrics")
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4")

    @get("/", include_in_schema=False)
    async def page() -> Response:  # pyright: ignore[reportUnusedFunction]
        return serving.page.response()

    @get("/ping")
    async def ping() -> Response:  # pyright: ignore[reportUnusedFunction]
        return json_response({})

    @get("/version")
    async def version() -> Response:  # pyright: ignore[reportUnusedFunction]
        return json_response({"version": __version__})

    return router


def _model_card(serving: Serving, name: str) -> dict[str, object]:
    info = serving.client.engine.info
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "leanserve",
        "root": serving.model_name,
        "max_model_len": info.max_context_tokens if info else None,
        "architecture": info.architecture if info else None,
        "dtype": info.dtype if info else None,
        "device": info.device if info else None,
        "attention": info.attention if info else None,
        "ranks": len(info.pages_per_rank) if info else None,
    }
