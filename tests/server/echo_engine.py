"""A real engine as far as the socket can tell: it answers with the tokens of the prompt, over and over."""

import asyncio
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import zmq
import zmq.asyncio

from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.messages import (
    Abort,
    EngineFailed,
    EngineInfo,
    EngineReady,
    Loading,
    Shutdown,
    Submit,
    TokenOutput,
    TokenOutputs,
    decode_to_engine,
    encode,
)


def engine_info(*, vocab_size: int = 512, max_context_tokens: int = 4096, eos: tuple[int, ...] = (2,)) -> EngineInfo:
    return EngineInfo(
        architecture="echo",
        vocab_size=vocab_size,
        eos_token_ids=eos,
        max_context_tokens=max_context_tokens,
        model_max_tokens=max_context_tokens,
        page_tokens=16,
        pages_per_rank=(64,),
        kv_bytes_per_token=0,
        dtype="float32",
        device="none",
        attention="none",
    )


def echo_logprobs(token_ids: Sequence[int], num_top: int) -> Logprobs:
    """Each token has -id / 8 and is second to the ids after it, whose log-probabilities are -1/8, -1/4, ..."""
    top_ids = [token_id + 1 + i for token_id in token_ids for i in range(num_top)]
    top = [-(1 + i) / 8 for _ in token_ids for i in range(num_top)]
    return Logprobs(
        num_top,
        array("f", [-token_id / 8 for token_id in token_ids]).tobytes(),
        array("i", [2] * len(token_ids)).tobytes(),
        array("i", top_ids).tobytes(),
        array("f", top).tobytes(),
    )


@dataclass
class _Running:
    submit: Submit
    prompt: "array[int]"
    sent: int = 0


class EchoEngine:
    """Echoes. A prompt that begins with `stall_token` gets no token; one with `error_token` ends in an error after two;
    one with `deadly_token` is the end of the engine in its first step.

    Args:
        step_s: time between steps.
        fail_after_steps: the whole engine fails after so many.
        pause_at_tokens: a request that has so many gets no more, for the time being.
    """

    stall_token = 7
    error_token = 9
    deadly_token = 13

    def __init__(
        self,
        address: str,
        *,
        info: EngineInfo | None = None,
        step_s: float = 0.0,
        tokens_per_output: int = 1,
        fail_after_steps: int | None = None,
        pause_at_tokens: int | None = None,
    ) -> None:
        self.info = info or engine_info()
        self.step_s = step_s
        self.tokens_per_output = tokens_per_output
        self.fail_after_steps = fail_after_steps
        self.pause_at_tokens = pause_at_tokens
        self.submits: list[Submit] = []
        self.aborts: Counter[str] = Counter()
        self.shutdowns = 0
        self.steps = 0
        self.running: dict[str, _Running] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.linger = 1000
        self._socket.connect(address)
        self._tasks: list[asyncio.Task[None]] = []

    def disarm(self) -> None:
        """From now on no token means trouble: random prompts begin with any."""
        self.stall_token = self.error_token = self.deadly_token = -1

    async def load(self) -> None:
        await self._socket.send(encode(Loading("weights", 1, 2)))

    async def ready(self) -> None:
        await self._socket.send(encode(EngineReady(self.info)))
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._run())]

    async def fail(self, message: str) -> None:
        await self._socket.send(encode(EngineFailed(message)))

    async def send_raw(self, frame: bytes) -> None:
        await self._socket.send(frame)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()

    async def _listen(self) -> None:
        while True:
            match decode_to_engine(await self._socket.recv()):
                case Submit() as submit:
                    self.submits.append(submit)
                    prompt = array("i")
                    prompt.frombytes(submit.prompt_token_ids)
                    sent = len(submit.output_token_ids) // prompt.itemsize
                    self.running[submit.request_id] = _Running(submit, prompt, sent)
                case Abort(request_id=request_id):
                    self.aborts[request_id] += 1
                    self.running.pop(request_id, None)
                case Shutdown():
                    self.shutdowns += 1

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if not self.running:
                await asyncio.sleep(0.001)
                continue
            self.steps += 1
            if any(request.prompt[0] == self.deadly_token for request in self.running.values()):
                self._socket.close(linger=0)
                return
            if self.fail_after_steps is not None and self.steps > self.fail_after_steps:
                await self.fail("it was told to")
                return
            outputs = [output for request in list(self.running.values()) if (output := self._step(request))]
            message = TokenOutputs(self.steps, outputs, len(self.running), 0, (len(self.running),), 0)
            await self._socket.send(encode(message))

    def _step(self, request: _Running) -> TokenOutput | None:
        request_id = request.submit.request_id
        if request.prompt[0] == self.stall_token:
            return None
        if self.pause_at_tokens is not None and request.sent >= self.pause_at_tokens:
            return None
        if request.prompt[0] == self.error_token and request.sent == 2:
            del self.running[request_id]
            return TokenOutput(request_id, [], "error", "the request hit an odd case")
        token_ids: list[int] = []
        cached_tokens = 0 if request.sent else len(request.prompt) // 2
        sampling = request.submit.sampling
        reason: str | None = None
        stop_token_id: int | None = None
        while len(token_ids) < self.tokens_per_output and reason is None:
            token_id = request.prompt[request.sent % len(request.prompt)]
            token_ids.append(token_id)
            request.sent += 1
            ends = token_id in sampling.stop_token_ids or (
                token_id in self.info.eos_token_ids and not sampling.ignore_eos
            )
            if ends:
                reason, stop_token_id = "stop", token_id
            elif request.sent >= sampling.max_tokens:
                reason = "length"
        if reason is not None:
            del self.running[request_id]
        is_first = request.sent == len(token_ids)
        page_owners = array("H", self.page_owners(len(request.prompt)) if is_first else []).tobytes()
        logprobs = None if sampling.logprobs is None else echo_logprobs(token_ids, sampling.logprobs)
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None and request.sent == len(token_ids):
            prompt_logprobs = echo_logprobs(request.prompt[1:], sampling.prompt_logprobs)
        return TokenOutput(
            request_id, token_ids, reason, None, stop_token_id, cached_tokens, logprobs, prompt_logprobs, page_owners
        )

    def page_owners(self, prompt_tokens: int) -> list[int]:
        """Pages are dealt to three ranks in turn, beginning with rank 2."""
        return [(2 + page) % 3 for page in range(-(-prompt_tokens // self.info.page_tokens))]
