"""One step's work, as rank 0 tells it to every rank: deltas only, so its size is O(batch) and not O(context)."""

import struct
import zlib
from collections.abc import Sequence

import msgspec

from leanserve.contracts.kv_sharding import PageCopy, PageGrant
from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.sampling import SamplingParams

__all__ = ["Batch", "IdleCheck", "NewSequence", "Row", "StepResult", "StepTimes", "Stop", "step_checksum"]


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that starts, or starts again after a preemption."""

    sequence_id: int
    token_ids: bytes
    """int32, native byte order: the prompt, then what was already generated before a preemption."""
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    """The seed in force: the request's own, or the one drawn for it on rank 0."""
    num_scored_tokens: int = 0
    """Of a request with `prompt_logprobs`: how many prompt tokens, the first included, have theirs from before a
    preemption."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, start + count) of a sequence are computed in this step."""

    sequence_id: int
    start: int
    count: int
    samples: bool
    """The row ends at the sequence's newest token, so the next one is sampled from it."""


class Batch(msgspec.Struct, frozen=True, array_like=True, tag="batch"):
    """A step message. Ranks apply it in this order: dropped, started, grants, copies, rows.

    `rows` holds decode rows (count 1, samples true) first, prefill chunks after them. A row's tokens are either in
    `started`, or were sampled in an earlier step, which every rank has launched.
    """

    step: int
    """Counts from 1; every rank sees each step once, in order."""
    dropped: list[int]
    """Sequences whose pages and state are released: finished, aborted or preempted."""
    started: list[NewSequence]
    grants: list[PageGrant]
    """New pages of all ranks; a rank keeps its own."""
    copies: list[PageCopy]
    """All sources are read before any target is written: a page may be both."""
    rows: list[Row]
    checked_step: int
    """The newest step that rank 0 completed (0: none), the last one or the one before that, and ..."""
    checksum: int
    """... its checksum: a rank that has another one for it stops with DesyncError."""


class IdleCheck(msgspec.Struct, frozen=True, array_like=True, tag="idle"):
    """There is nothing to do: every rank compares its past with the others', which also shows that it is there."""


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """The last message on the channel: every rank ends in an orderly way."""


class StepTimes(msgspec.Struct, frozen=True, array_like=True):
    """Where rank 0's device spent a step, in seconds. (On a GPU: what it did between two steps that were collected.)"""

    forward_s: float = 0.0
    """Laying out the inputs, the model's layers and logits."""
    sample_s: float = 0.0
    """The choice of tokens and telling it to the ranks."""
    combine_s: float = 0.0
    """Of both: in collectives, waiting for other ranks included. Those inside a CUDA graph are not counted."""


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0's worker gives back: one token per sampling row, in row order, and what belongs to it."""

    step: int
    token_ids: list[int]
    times: StepTimes = StepTimes()
    logprobs: dict[int, Logprobs] = {}
    """By place in token_ids: of the tokens whose requests asked for `logprobs`."""
    prompt_logprobs: dict[int, Logprobs] = {}
    """By sequence id: of the prompt tokens that this step scored."""
    complete: set[int] = set()
    """Sequences whose structured output is complete with the token they got: nothing may follow."""
    failed: dict[int, str] = {}
    """Sequences that cannot go on, alone, for what their structured outputs ask, and why; a token of theirs in
    token_ids means nothing."""
    not_finite: set[int] = set()
    """Sequences that got no token, because their logits are not all finite; what stands in token_ids for it means
    nothing."""


def step_checksum(step: int, token_ids: Sequence[int]) -> int:
    """CRC-32 of a step's number and sampled tokens: what every rank must agree on."""
    return zlib.crc32(struct.pack(f"=q{len(token_ids)}q", step, *token_ids))
