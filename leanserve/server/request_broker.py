"""Between the streams and the engine that is here now: requests go to it when their turn is, outputs come back.

Knows messages and whose they are; nothing of sockets, nor of how one engine follows another.
"""

import logging
import secrets
from collections.abc import Callable

import msgspec

from leanserve.contracts.errors import EngineError, OverloadedError
from leanserve.contracts.messages import Abort, Submit, TokenOutputs
from leanserve.contracts.sampling import FinishReason, SamplingParams
from leanserve.server.errors import DeadlyRequestError
from leanserve.server.live_requests import TOKEN_ID_BYTES, LiveRequest, LiveRequests
from leanserve.server.output_stream import OutputStream
from leanserve.server.probation import Probation
from leanserve.server.statistics import RequestStatistics

__all__ = ["RequestBroker"]

logger = logging.getLogger("leanserve.server")


class RequestBroker:
    """Belongs to one event loop.

    Args:
        send: to the engine; False when none is connected.
    """

    def __init__(self, send: Callable[[Submit | Abort], bool], statistics: RequestStatistics) -> None:
        self._send = send
        self._statistics = statistics
        self.live = LiveRequests()
        self._probation = Probation()
        self._has_engine = False

    def submit(self, stream: OutputStream, request_id: str, prompt_token_ids: bytes, sampling: SamplingParams) -> None:
        """Take a request in. The engine gets it now, unless it has to wait for another that is tried alone.

        Raises:
            OverloadedError: no engine is connected.
        """
        if sampling.seed is None and not sampling.is_greedy:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        times = self._statistics.submitted(stream.arrived_at, len(prompt_token_ids) // TOKEN_ID_BYTES)
        stream.times[request_id] = times
        request = LiveRequest(request_id, prompt_token_ids, sampling, stream, times)
        self.live.add(request)
        if not self._probation.lets_in:
            self._probation.hold(request)
        elif not self._send(self.live.hand_over(request)):
            self.live.remove(request_id)  # it has just gone, and `engine_lost` is still to come
            raise OverloadedError("the engine is not connected; try again soon", retry_after_s=2)

    def abort(self, request_id: str, reason: FinishReason) -> None:
        """Stop a request; nothing happens if it has ended."""
        request = self.live.get(request_id)
        if request is None:
            return
        self._statistics.ended(request.times, reason)
        wire_id = self.live.remove(request_id)
        if wire_id is not None:
            self._send(Abort(wire_id))
            self._hand_over()

    def deliver(self, message: TokenOutputs) -> None:
        """A step's outputs go to their streams."""
        statistics = self._statistics
        if message.step_report is not None:
            statistics.reported(message.step_report)
        now = statistics.step()
        for progress in message.prefills:
            if (told := self.live.at_engine(progress.request_id)) is not None:
                statistics.scheduled(told.times)
                told.stream.put_progress(msgspec.structs.replace(progress, request_id=told.request_id))
        for output in message.outputs:
            received = self.live.receive(output)
            if received is None:  # aborted while this was on its way
                continue
            request, output = received
            if output.token_ids:
                statistics.delivered(request.times, len(output.token_ids), output.cached_tokens, now)
            if output.finish_reason is not None:
                statistics.ended(request.times, output.finish_reason)
            request.stream.put(output)
        self._hand_over()

    def engine_ready(self) -> None:
        """An engine is here, and has none of the requests."""
        self._has_engine = True
        self._hand_over()

    def engine_lost(self) -> None:
        """It is gone, with all it had. A request that it died of ends."""
        self._has_engine = False
        tried = self._probation.engine_lost(self.live.engine_lost())
        if tried is None:
            return
        request_id = tried.live[0].request_id
        extra = {"request_id": request_id}
        if tried.failed_trials == 1:
            logger.warning(
                "request %s was on probation when the engine died: it gets a second trial, alone",
                request_id,
                extra=extra | {"event": "request_suspected"},
            )
            return
        logger.error(
            "request %s was alone on probation when the engine died: it is failed, and not tried again",
            request_id,
            extra=extra | {"event": "request_poisonous"},
        )
        tried.live[0].stream.fail(
            DeadlyRequestError(
                "the engine died twice while it worked on this request to see if it was to blame; it is not tried again"
            )
        )

    def fail_all(self, message: str) -> None:
        """No engine is to come: every request ends with an EngineError."""
        requests = list(self.live)
        for request in requests:
            self._statistics.ended(request.times, "error")
            self.live.remove(request.request_id)
        for stream in {request.stream for request in requests}:
            stream.fail(EngineError(message))

    def _hand_over(self) -> None:
        """Give the engine what it may have of the requests that outlived another."""
        if self._has_engine and not self._probation.is_over:
            for request in self._probation.next():
                self._send(self.live.hand_over(request))
