"""The requests that have come and not ended, with all that the next engine would need to go on with them."""

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from leanserve.contracts.messages import Logprobs, Submit, TokenOutput
from leanserve.contracts.sampling import SamplingParams
from leanserve.server.output_stream import OutputStream
from leanserve.server.statistics import RequestTimes

__all__ = ["TOKEN_ID_BYTES", "LiveRequest", "LiveRequests"]

TOKEN_ID_BYTES = 4


@dataclass(eq=False)
class LiveRequest:
    """One request, from its submission to its end."""

    request_id: str
    prompt_token_ids: bytes
    sampling: SamplingParams
    """With a seed, unless it is greedy: so it goes on the same on another engine."""
    stream: OutputStream
    times: RequestTimes
    output_token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    """Every token received so far."""
    tokens_of_engine: int = 0
    """How many of them the present engine gave."""
    prompt_rows: int = 0
    """Prompt tokens whose log-probabilities have been received, from any engine ..."""
    prompt_rows_of_engine: int = 0
    """... and from the present one, which computes all of them again."""
    submissions: int = 0
    """How many engines it was given to."""
    has_ended: bool = False

    @property
    def wire_id(self) -> str:
        """Its name at the engine: another one for every engine, so that late words of a dead one reach nobody."""
        return self.request_id if self.submissions <= 1 else f"{self.request_id}~{self.submissions}"

    def new_rows(self, part: Logprobs) -> Logprobs | None:
        """Of the next part of the prompt's log-probabilities, what no engine told before."""
        known = min(max(self.prompt_rows - self.prompt_rows_of_engine, 0), len(part))
        self.prompt_rows_of_engine += len(part)
        self.prompt_rows = max(self.prompt_rows, self.prompt_rows_of_engine)
        if known == 0:
            return part
        return Logprobs.join([part.row(index) for index in range(known, len(part))]) if known < len(part) else None

    def as_submit(self) -> Submit:
        return Submit(self.wire_id, self.prompt_token_ids, self.sampling, self.output_token_ids.tobytes())


class LiveRequests:
    """Live requests in order of arrival, by their own names, and by those that the present engine has for them."""

    def __init__(self) -> None:
        self._by_id: dict[str, LiveRequest] = {}
        self._by_wire_id: dict[str, LiveRequest] = {}
        """Those that the present engine has."""
        self.prompt_tokens = 0
        """Tokens of all their prompts."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._by_id.values()))

    def get(self, request_id: str) -> LiveRequest | None:
        return self._by_id.get(request_id)

    def at_engine(self, wire_id: str) -> LiveRequest | None:
        """The request that the present engine knows by this name."""
        return self._by_wire_id.get(wire_id)

    def add(self, request: LiveRequest) -> None:
        assert request.request_id not in self._by_id, "request ids are ours and unique"
        self._by_id[request.request_id] = request
        self.prompt_tokens += request.times.prompt_tokens

    def hand_over(self, request: LiveRequest) -> Submit:
        """The present engine gets a request. Returns what to tell it."""
        request.submissions += 1
        if request.submissions > 1:
            request.times.resumed_at += (time.perf_counter(),)
        request.tokens_of_engine = request.prompt_rows_of_engine = 0
        self._by_wire_id[request.wire_id] = request
        return request.as_submit()

    def remove(self, request_id: str) -> str | None:
        """Drop a request. Returns its name at the engine; None if the engine does not have it."""
        request = self._by_id.pop(request_id, None)
        if request is None:
            return None
        request.has_ended = True
        self.prompt_tokens -= request.times.prompt_tokens
        return request.wire_id if self._by_wire_id.pop(request.wire_id, None) is not None else None

    def receive(self, output: TokenOutput) -> tuple[LiveRequest, TokenOutput] | None:
        """Note an output. Returns whose it is, under the request's own id; None: of one that has ended."""
        request = self._by_wire_id.get(output.request_id)
        if request is None:
            return None
        request.output_token_ids.extend(output.token_ids)
        request.tokens_of_engine += len(output.token_ids)
        if output.prompt_logprobs is not None:
            output = msgspec.structs.replace(output, prompt_logprobs=request.new_rows(output.prompt_logprobs))
        if output.finish_reason is not None:
            self.remove(request.request_id)
        if output.request_id != request.request_id:
            output = msgspec.structs.replace(output, request_id=request.request_id)
        return request, output

    def engine_lost(self) -> list[LiveRequest]:
        """The engine died. Returns those that it had."""
        lost = list(self._by_wire_id.values())
        self._by_wire_id.clear()
        now = time.perf_counter()
        for request in self._by_id.values():
            if request.submissions > 0:
                request.times.engine_lost_at += (now,)
        return lost
