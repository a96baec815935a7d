"""The answers of /v1/chat/completions, in the shape that OpenAI's clients read."""

from typing import Any, get_args
from uuid import uuid4

import msgspec

from leanserve.contracts.errors import RequestError
from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.answer import Answer
from leanserve.server.chat_request import ChatRequest
from leanserve.server.choices import Piece, make_choices
from leanserve.server.prompt_intake import Prompt
from leanserve.server.serving import Serving
from leanserve.server.tokenizer import Tokenizer
from leanserve.server.tool_calls import ToolCallParser, ToolDeltas, ToolFormat

__all__ = ["ChatCompletion", "prepare_chat"]


async def prepare_chat(serving: Serving, request: ChatRequest) -> "ChatCompletion":
    """Render, tokenize and check a conversation. What max_tokens leaves open is all that the context has left.

    Raises:
        RequestError: it cannot be served.
        OverloadedError: not now.
    """
    sampling = request.sampling(default_max_tokens=max(1, request.min_tokens or 0))
    info = serving.admit(sampling.n)
    tools_without_format = request.uses_tools and serving.tool_format is None
    template_has_tools = serving.chat_template is not None and serving.chat_template.knows_tools
    if tools_without_format and template_has_tools and request.tool_choice in (None, "auto"):
        raise RequestError(
            "how this model writes function calls is not known: its chat template shows none of "
            f"{', '.join(get_args(ToolFormat))}; use tool_choice required or a named function, or start the server "
            "with --tool-format",
            param="tools",
            code="unsupported",
        )
    told = request if request.uses_tools else request.model_copy(update={"tools": None})
    if request.reasoning_effort is not None:
        variables = {"reasoning_effort": request.reasoning_effort, **(request.chat_template_kwargs or {})}
        told = told.model_copy(update={"chat_template_kwargs": variables})
    text = await serving.render(request.messages, told)
    [prompt] = await serving.prompts.prepare([text], request, sampling, info)
    if request.given_max_tokens is None:
        left = info.max_context_tokens - prompt.num_tokens
        sampling = msgspec.structs.replace(sampling, max_tokens=left)
    name = request.model or serving.model_name
    return ChatCompletion(request, prompt, sampling, serving.prompts.text_tokenizer(), name, serving.tool_format)


class ChatCompletion(Answer):
    """One answer of /v1/chat/completions.

    Args:
        style: how this model writes function calls when it may choose; None: nobody knows.
    """

    operation = "chat"

    def __init__(
        self,
        request: ChatRequest,
        prompt: Prompt,
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        model_name: str,
        style: ToolFormat | None,
    ) -> None:
        answer_id = f"chatcmpl-{uuid4().hex}"
        if request.uses_tools:  # the marks of a call are special tokens of some models
            request = request.model_copy(update={"skip_special_tokens": False})
        choices = make_choices(answer_id, request, [prompt], sampling, tokenizer)
        super().__init__(
            answer_id,
            request,
            choices,
            model_name,
            chunk_object="chat.completion.chunk",
            whole_object="chat.completion",
        )
        self._tokenizer = tokenizer
        self._shows_ids = bool(request.return_tokens_as_token_ids)
        self._returns_token_ids = bool(request.return_token_ids)
        self._parsers = {choice.index: _parser(request, style) for choice in choices.values()}
        self._begun: set[int] = set()

    def choice_object(self, piece: Piece) -> dict[str, object]:
        parser = self._parsers[piece.index]
        deltas = ToolDeltas(piece.text) if parser is None else self._deltas(parser, piece)
        reason = piece.finish_reason
        if reason == "stop" and parser is not None and parser.num_calls and not parser.was_cut:
            reason = "tool_calls"
        choice: dict[str, object] = {
            "index": piece.index,
            **(self._delta(piece.index, deltas) if self.streams else _message(deltas)),
            "logprobs": None if piece.logprobs is None else self._logprobs(piece.token_ids, piece.logprobs),
            "finish_reason": reason,
            "stop_reason": piece.stop_reason,
        }
        if self._returns_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _deltas(self, parser: ToolCallParser, piece: Piece) -> ToolDeltas:
        """What a piece says and calls, without the special tokens that are no mark of a call."""
        deltas = parser.push(piece.text)
        if piece.finish_reason is not None:
            rest = parser.finish()
            deltas = ToolDeltas(deltas.content + rest.content, deltas.calls + rest.calls)
        deltas.content = self._tokenizer.without_special_tokens(deltas.content)
        return deltas

    def _delta(self, index: int, deltas: ToolDeltas) -> dict[str, object]:
        """A stream's part of the message; the first one says whose it is."""
        delta: dict[str, object] = {}
        if index not in self._begun:
            self._begun.add(index)
            delta["role"] = "assistant"
        delta["content"] = deltas.content
        if deltas.calls:
            delta["tool_calls"] = deltas.calls
        return {"delta": delta}

    def _logprobs(self, token_ids: list[int], logprobs: Logprobs) -> dict[str, object]:
        entries: list[dict[str, object]] = []
        for token_id, row in zip(token_ids, logprobs.rows(), strict=True):
            top = [self._token(top_id, logprob) for top_id, logprob in row.top]
            entries.append({**self._token(token_id, row.logprob), "top_logprobs": top})
        return {"content": entries}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        token = f"token_id:{token_id}" if self._shows_ids else data.decode("utf-8", "replace")
        return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(data)}


def _parser(request: ChatRequest, style: ToolFormat | None) -> ToolCallParser | None:
    """What takes a choice's text apart; None: it is all said."""
    if not request.uses_tools:
        return None
    names = {tool.function.name for tool in request.tools or ()}
    parallel = request.parallel_tool_calls is not False
    if request.named_tool is not None:
        return ToolCallParser(None, names, only=request.named_tool, parallel=False)
    if request.tool_choice == "required":
        return ToolCallParser(None, names, parallel=parallel)
    return None if style is None else ToolCallParser(style, names, parallel=parallel)


def _message(deltas: ToolDeltas) -> dict[str, object]:
    """A whole message, its calls put together."""
    message: dict[str, object] = {"role": "assistant", "content": deltas.content}
    if deltas.calls:
        message["content"] = deltas.content if deltas.content.strip() else None
        message["tool_calls"] = _joined_calls(deltas.calls)
    return {"message": message}


def _joined_calls(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if "id" in delta:
            calls[delta["index"]] = {"id": delta["id"], "type": "function", "function": dict(delta["function"])}
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return list(calls.values())
