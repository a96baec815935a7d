"""What the front end and the engine on rank 0 say to each other, as msgpack over one ZMQ socket pair; and what every
rank tells the front end of itself, on a socket of its own."""

import msgspec

from leanserve.contracts.batch import StepTimes
from leanserve.contracts.config import EngineConfig
from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.sampling import FinishReason, SamplingParams

__all__ = [
    "Abort",
    "Configure",
    "EngineFailed",
    "EngineInfo",
    "EngineReady",
    "FromEngine",
    "FromRank",
    "Hello",
    "Loading",
    "PrefillProgress",
    "Pulse",
    "RankFailed",
    "Shutdown",
    "StepReport",
    "Submit",
    "ToEngine",
    "TokenOutput",
    "TokenOutputs",
    "decode_from_engine",
    "decode_from_rank",
    "decode_to_engine",
    "encode",
]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Rank 0's first words: it has no configuration yet."""

    pid: int


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """The front end's answer to Hello. Every rank gets its configuration from here, through rank 0."""

    config: EngineConfig
    front_end_pid: int
    """Ranks end themselves when this process is gone."""
    pulse_address: str
    """Where every rank tells the front end of itself."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A request, already checked and tokenized. Ends with exactly one TokenOutput whose `finish_reason` is set."""

    request_id: str
    prompt_token_ids: bytes
    """int32, native byte order."""
    sampling: SamplingParams
    output_token_ids: bytes = b""
    """int32: what an engine that is gone generated already. This one goes on behind them; they are outputs, not prompt,
    to penalties, limits, seeds and stop rules."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request, in whatever phase it is. Unknown ids are ignored: it may just have finished."""

    request_id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End every rank, now."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of rank 0 while it loads."""

    stage: str
    done: int
    total: int


class EngineInfo(msgspec.Struct, frozen=True):
    """Facts about a ready engine."""

    architecture: str
    """The model family with its size, for people: `llama, 8 layers, 0.2B parameters`."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_context_tokens: int
    """Longest prompt + completion this engine accepts."""
    model_max_tokens: int
    """The model's own limit (max_position_embeddings, and what rope scaling makes of it)."""
    page_tokens: int
    pages_per_rank: tuple[int, ...]
    kv_bytes_per_token: int
    """Over all layers, K and V, on the rank that owns the token."""
    dtype: str
    device: str
    """For people: `cpu, 2 threads per rank` or `NVIDIA H200`."""
    attention: str
    """`triton` or `portable`."""
    captures_graphs: bool = False
    """Whether decode steps are replayed as CUDA graphs; and where a launch thus does not wait for the device, steps
    overlap."""
    prefix_cache: bool = False
    """Whether requests that begin alike share pages."""
    weights: str = ""
    """Which weights are split over the ranks, what that takes on each, and why; for people."""
    tokens_of_one_more_rank: int = 0
    """By so many the KV cache would grow with one more rank like these; 0 where the ranks share one memory."""


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine will not (or no longer) serve."""

    message: str
    is_final: bool = False
    """Another attempt would end the same way, as far as this one can tell: an option or the checkpoint is wrong."""


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    """With finish_reason "error": what went wrong, for the client."""
    stop_token_id: int | None = None
    """With finish_reason "stop": the token that ended it (also the last of token_ids)."""
    cached_tokens: int = 0
    """In the request's first output that has tokens: how many prompt tokens the prefix cache held."""
    logprobs: Logprobs | None = None
    """Of token_ids, for a request that asked for `logprobs`."""
    prompt_logprobs: Logprobs | None = None
    """For a request that asked for `prompt_logprobs`: of its prompt tokens from the second on, a part with each step's
    output, in order. All of them have come before, or with, the first token."""
    page_owners: bytes = b""
    """In the request's first output that has tokens: the rank that holds each page of the prompt, in order, as uint16
    in native byte order. Told unasked: it is small beside the prompt that was sent (2 bytes a page, 4 a token)."""
    error_code: str | None = None
    """With an error that is the request's own fault, and would come again: a stable short word for it."""
    error_param: str | None = None
    """The field at fault, if it is known."""


class PrefillProgress(msgspec.Struct, frozen=True, array_like=True):
    """How far a request's prompt is, after a step that computed a part of it but not its end."""

    request_id: str
    cached_tokens: int
    """Of the prompt, found in the prefix cache when it was first admitted."""
    processed_tokens: int
    """In the KV cache now, found or computed."""
    total_tokens: int
    """To be there before the next token: the prompt; after a preemption, what was generated as well."""


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """What one step held and took. Every step is reported once, when its tokens are known.

    Where steps overlap, the host plans this one and books the one before it while the device computes the one before
    it: a step then takes about as long as the longer of the two, and not as their sum.
    """

    decode_rows: int
    """Sequences that lacked one token: running streams, and now and then a prompt's last token."""
    prefill_tokens: int
    """Of prompts, and of sequences that are computed again after a preemption."""
    schedule_s: float
    """Choosing the step's work and booking its results, on the host."""
    times: StepTimes
    step_s: float
    """From when it began, or the one before it ended if that was later, until its results were booked. So busy steps
    add up to the time that has passed, overlapped or not."""


class TokenOutputs(msgspec.Struct, frozen=True, tag="tokens"):
    """One step's outputs, and what the front end needs to know about the engine's load.

    Gauges are as of now; counters count since the engine started.
    """

    step: int
    """The newest step whose tokens are known."""
    outputs: list[TokenOutput]
    running: int
    waiting: int
    """Requests in the queue, those sent back to it by a preemption included."""
    pages_used_per_rank: tuple[int, ...]
    """Pages referenced by live sequences; `EngineInfo.pages_per_rank` is how many there are."""
    preemptions: int
    """Since start."""
    prefills: tuple[PrefillProgress, ...] = ()
    """Requests in the middle of their prompts that this step has brought forward."""
    pages_cached_per_rank: tuple[int, ...] = ()
    """Pages that no sequence references and the prefix cache keeps; they are free for whoever needs room."""
    prefix_queried_tokens: int = 0
    """Since start: prompt tokens of admitted requests that were looked up in the prefix cache."""
    prefix_hit_tokens: int = 0
    """Since start: how many of them it held."""
    step_report: StepReport | None = None
    """None in a message between two steps."""


class Pulse(msgspec.Struct, frozen=True, tag="pulse"):
    """A rank lives, sent about twice a second from a thread of its own, whatever the rank is doing."""

    rank: int
    pid: int
    host: str
    """The machine that `pid` belongs to, as `this_machine` names it."""
    step: int
    """The newest completed step, or idle check; 0 before the first."""
    busy_s: float
    """How long the current step has run; 0 between steps."""


class RankFailed(msgspec.Struct, frozen=True, tag="rank-failed"):
    """A rank's last words."""

    rank: int
    message: str
    is_final: bool = False
    """As of EngineFailed."""


ToEngine = Configure | Submit | Abort | Shutdown
FromEngine = Hello | Loading | EngineReady | EngineFailed | TokenOutputs
FromRank = Pulse | RankFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
