"""The first steps of a rank, which nobody asked for, so that the first requests need not wait for them.

Triton compiles a kernel for a kind of arguments when it is first launched so, which takes seconds, and CUDA loads a
kernel of torch when it is first used. Steps of each kind that requests will bring, run before the rank is ready, leave
nothing of this for them; the largest also takes from CUDA the memory that a full step needs.

A kind is the dtypes, head counts and sizes of the model and the options of the deployment. Lengths, batches and page
tables are none: see `tests/worker/test_warm_up.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from lean_attention import Backend
from leanserve.attention.kv_shard import KvShard
from leanserve.contracts.batch import Batch, NewSequence, Row, step_checksum
from leanserve.contracts.kv_sharding import KvSharding, PageCopy, PageGrant
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.ranks import Ranks
from leanserve.model.decoder import Decoder
from leanserve.worker.runner import Runner

__all__ = ["warm_up"]

_GREEDY = SamplingParams(temperature=0)
_OTHERS = (
    SamplingParams(seed=0),
    SamplingParams(seed=0, top_p=0.9, min_p=0.01, logprobs=1, prompt_logprobs=1),
    SamplingParams(seed=0, repetition_penalty=1.1, min_tokens=1, logit_bias={0: 1.0}, allowed_token_ids=(0, 1)),
)
_SHORT_TOKENS = 3
"""Of a short prompt."""


@dataclass(frozen=True)
class _Step:
    """What a batch holds beside its place among the others."""

    rows: list[Row]
    started: list[NewSequence] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)


def warm_up(
    decoder: Decoder,
    shard: KvShard,
    ranks: Ranks,
    sharding: KvSharding,
    *,
    max_batch_tokens: int,
    max_context_tokens: int,
    backend: Backend | None,
    progress: Callable[[int, int], None],
) -> None:
    """Run three steps: a prompt that fills one, decode rows beside short prompts, and decode rows alone.

    Every rank calls it, before the first request. What the pool holds afterwards means nothing.

    Args:
        max_batch_tokens: of a step.
        max_context_tokens, backend: as of the runner to come.
        progress: told (done, total) steps.
    """
    runner = Runner(
        decoder,
        shard,
        ranks,
        max_sequences=2 + len(_OTHERS),
        max_context_tokens=max_context_tokens,
        backend=backend,
    )
    longest = min(max_context_tokens, min(sharding.pages_per_rank) * sharding.num_ranks * sharding.page_tokens)
    steps = list(_steps(sharding, max(1, min(max(max_batch_tokens, _SHORT_TOKENS), longest - 2))))
    checksum = 0
    for number, step in enumerate(steps, start=1):
        progress(number - 1, len(steps))
        runner.launch(
            Batch(
                step=number,
                dropped=[],
                started=step.started,
                grants=step.grants,
                copies=step.copies,
                rows=step.rows,
                checked_step=number - 1,
                checksum=checksum,
            )
        )
        checksum = step_checksum(number, runner.collect().token_ids)
    progress(len(steps), len(steps))


def _steps(sharding: KvSharding, prompt_tokens: int) -> Iterator[_Step]:
    """Sequence 1 has a prompt of so many tokens, sequence 2 and those of the other options have short ones. They all
    write to the same pages: nobody reads what comes of it."""
    short = min(_SHORT_TOKENS, prompt_tokens)

    def new(sequence_id: int, tokens: int, sampling: SamplingParams) -> NewSequence:
        return NewSequence(sequence_id, np.zeros(tokens, np.int32).tobytes(), tokens, sampling, seed=0)

    def grown(sequence_id: int, before: int, tokens: int) -> list[PageGrant]:
        return [
            PageGrant(sequence_id, ordinal, ordinal % sharding.num_ranks, ordinal // sharding.num_ranks)
            for ordinal in range(sharding.pages_for(before), sharding.pages_for(tokens))
        ]

    yield _Step(
        rows=[Row(1, 0, prompt_tokens, samples=True)],
        started=[new(1, prompt_tokens, _GREEDY)],
        grants=grown(1, 0, prompt_tokens),
    )
    shorts = list(enumerate((_GREEDY, *_OTHERS), start=2))
    yield _Step(
        rows=[Row(1, prompt_tokens, 1, samples=True), *(Row(number, 0, short, samples=True) for number, _ in shorts)],
        started=[new(number, short, sampling) for number, sampling in shorts],
        grants=grown(1, prompt_tokens, prompt_tokens + 1)
        + [grant for number, _ in shorts for grant in grown(number, 0, short)],
        copies=[PageCopy(rank, 0, pages - 1) for rank, pages in enumerate(sharding.pages_per_rank)],
    )
    yield _Step(
        rows=[Row(1, prompt_tokens + 1, 1, samples=True), Row(2, short, 1, samples=True)],
        grants=grown(1, prompt_tokens + 1, prompt_tokens + 2) + grown(2, short, short + 1),
    )
