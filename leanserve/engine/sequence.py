"""One request's life: what was asked, what was generated, how much of it is in the KV cache. Knows no policy."""

from array import array
from enum import Enum

from leanserve.contracts.batch import NewSequence
from leanserve.contracts.sampling import FinishReason, SamplingParams
from leanserve.engine.pages import SequencePages

__all__ = ["TOKEN_ID_BYTES", "Sequence", "SequenceState"]

TOKEN_ID_BYTES = 4

PRIORITY_STEP_S = 10.0
"""By how long a priority greater by one puts a request off among others."""


class SequenceState(Enum):
    WAITING = "waiting"
    """New, or preempted."""
    RUNNING = "running"
    """Known to the ranks; alone in this state it holds pages."""
    FINISHED = "finished"


class Sequence:
    """Prompt and output ids are kept apart for life: a preemption must not turn outputs into prompt."""

    __slots__ = (
        "cached_tokens",
        "end_token_ids",
        "has_followed",
        "id",
        "is_long",
        "is_withdrawn",
        "leader",
        "leads",
        "leads_since_step",
        "max_total_tokens",
        "num_computed_tokens",
        "num_noted_tokens",
        "num_prompt_tokens",
        "num_scheduled_tokens",
        "num_scored_tokens",
        "num_tokens",
        "order",
        "output_token_ids",
        "page_names",
        "pages",
        "preemptions",
        "prompt_token_ids",
        "request_id",
        "sampling",
        "seed",
        "state",
    )

    def __init__(
        self,
        sequence_id: int,
        request_id: str,
        prompt_token_ids: bytes,
        sampling: SamplingParams,
        seed: int,
        end_token_ids: frozenset[int],
        output_token_ids: bytes = b"",
        arrived_s: float = 0.0,
    ) -> None:
        self.id = sequence_id
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        """int32, native byte order: the very object that was received, however long."""
        self.sampling = sampling
        self.seed = seed
        """The seed in force, kept over preemptions."""
        self.end_token_ids = end_token_ids
        self.num_prompt_tokens = len(prompt_token_ids) // TOKEN_ID_BYTES
        self.max_total_tokens = self.num_prompt_tokens + sampling.max_tokens
        self.output_token_ids = array("i", output_token_ids)
        """Begins with those of an engine before this one, if it is a request that outlived one."""
        self.num_tokens = self.num_prompt_tokens + len(self.output_token_ids)
        """Prompt and outputs, as far as they are known here."""
        self.num_scheduled_tokens = self.num_tokens
        """Those, and the ones that launched steps sample: only the devices know them yet."""
        self.num_computed_tokens = 0
        """Tokens whose KV is in the cache once all launched steps are done; the newest scheduled token's is not."""
        self.num_noted_tokens = 0
        """Of them, those that the prefix cache was told of."""
        self.num_scored_tokens = 0
        """Of a request with prompt_logprobs: prompt tokens whose logprobs are told; the first has none, and counts."""
        self.pages = SequencePages(sequence_id)
        """None of them while it waits."""
        self.page_names: list[bytes] = []
        """Of its first pages, as far as anybody asked; they stay right for life."""
        self.cached_tokens: int | None = None
        """Prompt tokens that were in the cache when it was first admitted; None before that."""
        self.is_long = False
        """Whether it had more to compute than a short prompt when that was last looked at."""
        self.is_withdrawn = False
        """Its pages may be wrong, and are not to be found by others."""
        self.order = (arrived_s + sampling.priority * PRIORITY_STEP_S, sequence_id)
        """Who comes first is served first. It never changes, and with a priority it is as if the request had come
        earlier or later: so whoever waits long enough comes before all that are more urgent and newer."""
        self.leader: Sequence | None = None
        """While it is set aside: who computes its next page."""
        self.has_followed = False
        """It was set aside once as a short prompt, and will not be again."""
        self.leads: int | None = None
        """The ordinal of the page of its prompt that it is about to complete."""
        self.leads_since_step = 0
        self.preemptions = 0
        self.state = SequenceState.WAITING

    @property
    def is_all_scheduled(self) -> bool:
        """Whether the last token that it may have is known, or being sampled."""
        return self.num_scheduled_tokens == self.max_total_tokens

    @property
    def max_cached_tokens(self) -> int:
        """Tokens at its beginning that need not be computed where their KV is cached: the next token is sampled from
        the newest one, and a prompt's logprobs come from computing it."""
        if self.sampling.prompt_logprobs is not None and self.num_scored_tokens < self.num_prompt_tokens:
            return max(self.num_scored_tokens - 1, 0)
        return self.num_tokens - 1

    def append(self, token_id: int) -> FinishReason | None:
        """Note a token that a step sampled. Returns why the sequence is complete with it, or None if it goes on."""
        self.output_token_ids.append(token_id)
        self.num_tokens += 1
        if token_id in self.end_token_ids:
            return "stop"
        return "length" if self.num_tokens == self.max_total_tokens else None

    def token_bytes(self, start: int, end: int) -> bytes:
        """Tokens [start, end) as int32 bytes."""
        prompt = self.prompt_token_ids[start * TOKEN_ID_BYTES : end * TOKEN_ID_BYTES]
        if end <= self.num_prompt_tokens:
            return prompt
        first = max(start - self.num_prompt_tokens, 0)
        return prompt + self.output_token_ids[first : end - self.num_prompt_tokens].tobytes()

    def as_new(self) -> NewSequence:
        """What a rank needs to compute it from its first token."""
        return NewSequence(
            sequence_id=self.id,
            token_ids=self.prompt_token_ids + self.output_token_ids.tobytes(),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.sampling,
            seed=self.seed,
            num_scored_tokens=self.num_scored_tokens,
        )
