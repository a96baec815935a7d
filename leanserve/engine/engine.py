"""Requests in, tokens out, one step at a time. Knows when a completion ends; not how a token is computed or where
it goes."""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import msgspec

from leanserve.contracts.batch import Batch, Row, StepResult, StepTimes
from leanserve.contracts.errors import EngineError, RequestError
from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.messages import (
    PrefillProgress,
    StepReport,
    Submit,
    TokenOutput,
    TokenOutputs,
)
from leanserve.contracts.sampling import FinishReason
from leanserve.engine.scheduler import Scheduler
from leanserve.engine.sequence import TOKEN_ID_BYTES, Sequence

__all__ = ["Engine", "Executor"]

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Computes batches on all ranks, in the order in which they are launched."""

    def launch(self, batch: Batch) -> None:
        """Begin a batch, which may have no rows. At most one other may be in flight."""
        ...

    def collect(self) -> StepResult:
        """The oldest batch in flight, waited for: one token per sampling row."""
        ...


@dataclass(frozen=True)
class _Launched:
    """A step in flight."""

    batch: Batch
    began_s: float
    schedule_s: float


class Engine:
    """Every accepted request gets exactly one TokenOutput with a finish reason: from `step`, `collect`, `abort` or
    `fail`.

    Where steps overlap, one stays in flight: the next is planned and launched before its tokens are known, unless
    `Scheduler.must_know_tokens`. A request that ends with one of them has a row too many in the next step; what that
    gives is dropped.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        eos_token_ids: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
        *,
        overlap: bool = False,
    ) -> None:
        """
        Args:
            clock: tells when a request came, in seconds.
            overlap: plan and launch a step while the one before it runs.
        """
        self._scheduler = scheduler
        self._clock = clock
        self._executor = executor
        self._overlap = overlap
        self._launched: deque[_Launched] = deque()
        """Steps in flight, the oldest first: two at most, and only within `step`."""
        self._collected_s = 0.0
        """When the newest one was."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._live: dict[str, Sequence] = {}
        self._next_sequence_id = 1
        self._prefills: tuple[PrefillProgress, ...] = ()
        """Of the newest step, until it is reported."""
        self._step_report: StepReport | None = None
        """Of a step that `report` has not told yet."""

    @property
    def has_work(self) -> bool:
        """A step would do something: compute tokens, take those of a step in flight, or tell the ranks what to
        forget."""
        return bool(self._launched) or self._scheduler.has_work

    def submit(self, request: Submit) -> None:
        """Accept a request.

        Raises:
            RequestTooLongError: it can never fit.
            RequestError: the prompt is empty, or it or the outputs so far are no int32 array, or those are complete.
            ValueError: the id belongs to a live request, which an answer under this id would end: the caller's mistake.
        """
        prompt_bytes = len(request.prompt_token_ids)
        if prompt_bytes == 0:
            raise RequestError("the prompt has no tokens; give at least one", param="prompt", code="empty_prompt")
        output_bytes = len(request.output_token_ids)
        for name, num_bytes in (("prompt_token_ids", prompt_bytes), ("output_token_ids", output_bytes)):
            if num_bytes % TOKEN_ID_BYTES:
                raise RequestError(
                    f"{name} has {num_bytes} bytes, not a multiple of {TOKEN_ID_BYTES}; send int32", param="prompt"
                )
        if output_bytes // TOKEN_ID_BYTES >= request.sampling.max_tokens:
            raise RequestError(
                f"{output_bytes // TOKEN_ID_BYTES} tokens were generated before and max_tokens is "
                f"{request.sampling.max_tokens}: nothing is left to do",
                param="max_tokens",
            )
        if request.request_id in self._live:
            raise ValueError(f"request id {request.request_id!r} is in use")
        sampling = request.sampling
        sequence = Sequence(
            sequence_id=self._next_sequence_id,
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=sampling,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            end_token_ids=sampling.end_token_ids(self._eos_token_ids),
            output_token_ids=request.output_token_ids,
            arrived_s=self._clock(),
        )
        self._scheduler.add(sequence)
        self._next_sequence_id += 1
        self._live[request.request_id] = sequence

    def abort(self, request_id: str) -> TokenOutput | None:
        """End a live request, in whatever phase. Returns its last output; None if no such request is live."""
        return self._end(self._live[request_id], "abort") if request_id in self._live else None

    def step(self) -> list[TokenOutput]:
        """Launch the next step, and collect it or, where steps overlap, the one before it.

        What the executor raises comes through: the engine is then only good for `fail`.
        """
        must_collect = bool(self._launched) and self._scheduler.must_know_tokens
        outputs = self.collect() if must_collect else []
        began_s = time.perf_counter()
        batch = self._scheduler.next_batch()
        if batch is not None:
            self._launched.append(_Launched(batch, began_s, time.perf_counter() - began_s))
            self._executor.launch(batch)
        num_staying = 1 if self._overlap and batch is not None else 0
        if len(self._launched) > num_staying:
            outputs += self.collect()
        return outputs

    def collect(self) -> list[TokenOutput]:
        """Wait for the oldest step in flight; nothing where there is none."""
        if not self._launched:
            return []
        launched = self._launched.popleft()
        result = self._executor.collect()
        executed_s = time.perf_counter()
        outputs = self._finish(launched.batch, result)
        self._step_report = _report(launched, result.times, executed_s, previous_s=self._collected_s)
        self._collected_s = time.perf_counter()
        return outputs

    def fail(self, message: str) -> list[TokenOutput]:
        """End all live requests with an error that says `message`. Returns their last outputs."""
        return [self._end(sequence, "error", message) for sequence in list(self._live.values())]

    def report(self, outputs: list[TokenOutput]) -> TokenOutputs:
        """`outputs` with the load as it is now, and what the newest step took if that was not told before."""
        scheduler = self._scheduler
        prefills, self._prefills = self._prefills, ()
        step_report, self._step_report = self._step_report, None
        return TokenOutputs(
            step=scheduler.completed_step,
            outputs=outputs,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_used_per_rank=scheduler.pages_used_per_rank,
            preemptions=scheduler.preemptions,
            prefills=prefills,
            pages_cached_per_rank=scheduler.pages_cached_per_rank,
            prefix_queried_tokens=scheduler.prefix_queried_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            step_report=step_report,
        )

    def _finish(self, batch: Batch, result: StepResult) -> list[TokenOutput]:
        expected_tokens = sum(row.samples for row in batch.rows)
        if result.step != batch.step or len(result.token_ids) != expected_tokens:
            raise EngineError(
                f"step {batch.step} should give {expected_tokens} tokens; "
                f"the executor gave {len(result.token_ids)} for step {result.step}"
            )
        outputs = self._prompt_scores(result)
        for place, sequence, token_id in self._scheduler.complete(batch, result):
            if sequence.id in result.not_finite:
                outputs.append(self._give_up(sequence, result.step))
                continue
            if sequence.id in result.failed:
                ended = self._end(sequence, "error", result.failed[sequence.id])
                outputs.append(
                    msgspec.structs.replace(ended, error_code="invalid_grammar", error_param="structured_outputs")
                )
                continue
            reason = sequence.append(token_id)
            if sequence.id in result.complete:
                reason = "stop"
            logprobs = result.logprobs.get(place)
            is_first = len(sequence.output_token_ids) == 1
            page_owners = self._scheduler.prompt_page_owners(sequence) if is_first else b""
            if reason is None:
                cached_tokens = _cached_tokens_to_tell(sequence)
                outputs.append(
                    TokenOutput(
                        sequence.request_id,
                        [token_id],
                        cached_tokens=cached_tokens,
                        logprobs=logprobs,
                        page_owners=page_owners,
                    )
                )
            else:
                outputs.append(self._end(sequence, reason, None, token_id, logprobs, page_owners))
        self._prefills = tuple(_progress(sequence, row) for sequence, row in self._scheduler.prefilling(batch))
        return outputs

    def _prompt_scores(self, result: StepResult) -> list[TokenOutput]:
        """Outputs without tokens: they come before the first token of the same step."""
        if not result.prompt_logprobs:
            return []
        outputs: list[TokenOutput] = []
        for sequence in self._live.values():
            logprobs = result.prompt_logprobs.get(sequence.id)
            if logprobs is not None:
                sequence.num_scored_tokens = max(sequence.num_scored_tokens, 1) + len(logprobs)
                outputs.append(TokenOutput(sequence.request_id, [], prompt_logprobs=logprobs))
        return outputs

    def _give_up(self, sequence: Sequence, step: int) -> TokenOutput:
        """The model gave nothing to draw a token from. What it stored may be wrong as well."""
        what = "the model gave logits that are not finite (NaN or infinity)"
        extra = {"event": "logits_not_finite", "request_id": sequence.request_id}
        logger.error("request %s is failed in step %d: %s", sequence.request_id, step, what, extra=extra)
        self._scheduler.withdraw(sequence)
        return self._end(sequence, "error", f"{what} for this request; the checkpoint or its dtype may be at fault")

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: str | None = None,
        token_id: int | None = None,
        logprobs: Logprobs | None = None,
        page_owners: bytes = b"",
    ) -> TokenOutput:
        del self._live[sequence.request_id]
        self._scheduler.remove(sequence)
        return TokenOutput(
            request_id=sequence.request_id,
            token_ids=[] if token_id is None else [token_id],
            finish_reason=reason,
            error=error,
            stop_token_id=token_id if token_id in sequence.end_token_ids else None,
            cached_tokens=0 if token_id is None else _cached_tokens_to_tell(sequence),
            logprobs=logprobs,
            page_owners=page_owners,
        )


def _report(launched: _Launched, times: StepTimes, executed_s: float, *, previous_s: float) -> StepReport:
    """What a step that has just been booked held and took; its result came at `executed_s`, and the step before was
    booked at `previous_s`."""
    rows = launched.batch.rows
    decode_rows = sum(1 for _ in takewhile(lambda row: row.count == 1, rows))
    prefill_tokens = sum(row.count for row in rows[decode_rows:])
    booked_s = time.perf_counter()
    schedule_s = launched.schedule_s + booked_s - executed_s
    return StepReport(decode_rows, prefill_tokens, schedule_s, times, booked_s - max(launched.began_s, previous_s))


def _progress(sequence: Sequence, row: Row) -> PrefillProgress:
    end = row.start + row.count
    return PrefillProgress(sequence.request_id, sequence.cached_tokens or 0, end, sequence.num_tokens)


def _cached_tokens_to_tell(sequence: Sequence) -> int:
    """Told once, with the first token."""
    return (sequence.cached_tokens or 0) if len(sequence.output_token_ids) == 1 else 0
