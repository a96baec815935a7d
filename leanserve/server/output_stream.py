"""What the reader of one or more requests sees: outputs in order, one end each, never more unread than allowed."""

import asyncio
from collections import deque
from collections.abc import Callable

from leanserve.contracts.errors import EngineError, LeanServeError, OverloadedError, RequestError
from leanserve.contracts.messages import PrefillProgress, TokenOutput
from leanserve.contracts.sampling import FinishReason, SamplingParams
from leanserve.server.errors import DeadlineError
from leanserve.server.statistics import Phase, RequestTimes

__all__ = ["OutputStream"]


class OutputStream:
    """The outputs of one or more requests, in the order they come: `EngineClient.open_stream` makes it.

        stream = client.open_stream()
        stream.submit("r1", token_bytes(prompt), sampling)
        try:
            while not stream.finished:
                output = await stream.next()
        finally:
            stream.abort()

    Every request ends here exactly once: with an output whose finish_reason is "stop" or "length", by `abort`, or,
    all of them together, by one exception out of `next`.
    """

    def __init__(
        self,
        submit: Callable[["OutputStream", str, bytes, SamplingParams], None],
        abort: Callable[[str, FinishReason], None],
        max_queued_tokens: int,
        arrived_at: float | None = None,
    ) -> None:
        self.arrived_at = arrived_at
        """When the requests came in; None: when they are submitted."""
        self.progress: dict[str, PrefillProgress] = {}
        """The newest of each request whose prompt is being computed."""
        self.times: dict[str, RequestTimes] = {}
        """Of each request."""
        self.phase: Phase = "queued"
        """Of the request that is furthest."""
        self.wakes_on_progress = False
        """Whether `next` returns None early when `progress` has changed."""
        self._submit_to_engine = submit
        self._abort_at_engine = abort
        self._max_queued_tokens = max_queued_tokens
        self._queue: deque[TokenOutput] = deque()
        self._queued_tokens = 0
        self._live: set[str] = set()
        self._error: LeanServeError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadlines: list[asyncio.TimerHandle] = []

    @property
    def finished(self) -> bool:
        """Nothing is left to read."""
        return not self._queue and not self._live and self._error is None

    @property
    def has_unread(self) -> bool:
        """`next` would return an output at once."""
        return bool(self._queue)

    def submit(self, request_id: str, prompt_token_ids: bytes, sampling: SamplingParams) -> None:
        """Hand a request to the engine.

        Raises:
            OverloadedError: the engine is still loading.
            EngineError: the engine failed or is gone.
        """
        self._submit_to_engine(self, request_id, prompt_token_ids, sampling)
        self._live.add(request_id)

    def limit(self, queue_s: float | None, total_s: float | None) -> None:
        """Fail with a DeadlineError if none has begun after `queue_s`, or not all have ended after `total_s`."""

        def expire(error: DeadlineError) -> None:
            if self._live and (error.code == "total_timeout" or self.phase == "queued"):
                self.fail(error, drop_queue=True)

        loop = asyncio.get_running_loop()
        if queue_s is not None:
            error = DeadlineError(f"the request waited {queue_s:g} s for its turn, the limit", code="queue_timeout")
            self._deadlines.append(loop.call_later(queue_s, expire, error))
        if total_s is not None:
            error = DeadlineError(f"the request took more than {total_s:g} s, the limit", code="total_timeout")
            self._deadlines.append(loop.call_later(total_s, expire, error))

    async def begun(self, timeout_s: float) -> None:
        """Wait until there is something to read, or for so long.

        Raises:
            DeadlineError, EngineError: instead of an output, as `next` does.
        """
        if not self._queue and self._error is None:
            await self._wait(timeout_s)
        if self._error is not None and not self._queue:
            error, self._error = self._error, None
            raise error

    async def next(self, timeout_s: float | None = None) -> TokenOutput | None:
        """The next output, or None after `timeout_s` of silence. Call only while not `finished`.

        Raises:
            EngineError: the engine failed, or could not finish one of the requests; all of them have ended.
            OverloadedError: outputs were read too slowly; all requests have ended.
        """
        if not self._queue and self._error is None:
            await self._wait(timeout_s)
        if self._queue:
            output = self._queue.popleft()
            self._queued_tokens -= len(output.token_ids)
            return output
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    def abort(self, request_id: str | None = None, *, reason: FinishReason = "abort") -> None:
        """Stop one request, or all; harmless for those that have ended. Outputs not read yet are dropped.

        `reason` is what statistics say: "stop" for a request whose text is complete.
        """
        ending = self._live & {request_id} if request_id is not None else self._live
        for ended in ending:
            self._abort_at_engine(ended, reason)
        if request_id is None:
            self._live.clear()
            self._queue.clear()
            self._error = None
            self._lift_deadlines()
        else:
            self._live.discard(request_id)
            if not self._live:
                self._lift_deadlines()
            self._queue = deque(output for output in self._queue if output.request_id != request_id)
        self._queued_tokens = sum(len(output.token_ids) for output in self._queue)

    def put_progress(self, progress: PrefillProgress) -> None:
        """The engine's side: the prompt of one of the live requests is so far."""
        self.progress[progress.request_id] = progress
        if self.phase == "queued":
            self.phase = "prefill"
        if self.wakes_on_progress:
            self._wake()

    def put(self, output: TokenOutput) -> None:
        """The engine's side: an output of one of the live requests."""
        self.phase = "decode"
        self.progress.pop(output.request_id, None)
        if output.finish_reason is not None:
            self._live.discard(output.request_id)
            if not self._live:
                self._lift_deadlines()
        if output.finish_reason in ("error", "abort"):
            self.fail(_error_of(output))
            return
        self._queue.append(output)
        self._queued_tokens += len(output.token_ids)
        if self._queued_tokens > self._max_queued_tokens and self._live:
            self.fail(
                OverloadedError(
                    f"{self._queued_tokens} tokens wait to be read; the request was stopped, at most "
                    f"{self._max_queued_tokens} may wait"
                ),
                drop_queue=True,
            )
            return
        self._wake()

    def fail(self, error: LeanServeError, *, drop_queue: bool = False) -> None:
        """The engine's side: end all requests; the reader gets what is queued, if it is not dropped, then `error`."""
        if self._error is not None:
            return
        for request_id in self._live:
            self._abort_at_engine(request_id, "error")
        self._live.clear()
        self._lift_deadlines()
        if drop_queue:
            self._queue.clear()
            self._queued_tokens = 0
        self._error = error
        self._wake()

    def _lift_deadlines(self) -> None:
        for deadline in self._deadlines:
            deadline.cancel()
        self._deadlines.clear()

    async def _wait(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._wake)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _error_of(output: TokenOutput) -> LeanServeError:
    message = output.error or "the engine gave up on the request"
    if output.error_code is not None:
        return RequestError(message, param=output.error_param, code=output.error_code)
    return EngineError(message)
