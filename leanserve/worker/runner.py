"""A rank's executor: applies step messages in order and computes them. Every rank runs the same code."""

import msgspec
import torch
from llguidance import LLTokenizer

from lean_attention import Backend
from leanserve.attention.kv_shard import KvShard
from leanserve.attention.step import StepAttention
from leanserve.contracts.batch import Batch, StepResult, StepTimes, step_checksum
from leanserve.contracts.errors import DesyncError
from leanserve.contracts.messages import Logprobs
from leanserve.distributed.ranks import Ranks
from leanserve.distributed.stopwatch import Stopwatch
from leanserve.model.decoder import Decoder
from leanserve.worker.adjustments import Adjustments
from leanserve.worker.inputs import SampledRows, StepInputs, build_inputs
from leanserve.worker.logprobs import score, score_prompts, unpack
from leanserve.worker.sampler import Draw, sample
from leanserve.worker.sequences import LiveSequence, LiveSequences

__all__ = ["Runner"]


class Runner:
    """Executes steps over this rank's shard.

    Args:
        grammar_tokenizer: on rank 0, what structured outputs need; None where the model has no tokenizer.
        backend: attention backend, None for the device's own.
    """

    def __init__(
        self,
        decoder: Decoder,
        shard: KvShard,
        ranks: Ranks,
        *,
        grammar_tokenizer: LLTokenizer | None = None,
        backend: Backend | None = None,
    ) -> None:
        self._decoder = decoder
        self._shard = shard
        self._ranks = ranks
        self._backend: Backend | None = backend
        self._live = LiveSequences(ranks.rank, shard.page_tokens)
        architecture = decoder.architecture
        self._adjustments = Adjustments(
            architecture.vocab_size, architecture.eos_token_ids, ranks.device, grammar_tokenizer
        )
        self._completed_step = 0
        self._checksum = 0
        self._in_forward = Stopwatch(ranks.device)
        self._in_sampling = Stopwatch(ranks.device)
        ranks.in_collectives.take_s()  # what loading took is not the first step's

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult:
        """Apply one step message and compute its rows.

        Raises:
            DesyncError: this rank's past differs from rank 0's.
        """
        self._check_past(batch)
        self._live.apply(batch.dropped, batch.started, batch.grants)
        if self._ranks.rank == 0:
            self._adjustments.apply(batch.dropped, batch.started)
        result = StepResult(batch.step, [])
        if batch.rows:
            with self._in_forward:
                inputs = build_inputs(batch.rows, self._live, self._shard.page_tokens, self._ranks)
                hidden_NC = self._decoder.forward(
                    inputs.tokens_N,
                    inputs.layout.positions_N,
                    self._attention(inputs),
                    prompt_lengths_N=inputs.prompt_lengths_N,
                )
            with self._in_sampling:
                prompt_logprobs: dict[int, Logprobs] = {}
                if inputs.scored is not None:
                    prompt_logprobs = score_prompts(self._decoder, hidden_NC, inputs.scored, self._ranks)
                result = self._sample(batch.step, hidden_NC, inputs.sampled, prompt_logprobs)
        self._completed_step = batch.step
        self._checksum = step_checksum(batch.step, result.token_ids)
        return msgspec.structs.replace(result, times=self._times())

    def _times(self) -> StepTimes:
        watches = (self._in_forward, self._in_sampling, self._ranks.in_collectives)
        return StepTimes(*(watch.take_s() for watch in watches))

    def compare_pasts(self) -> None:
        """Every rank calls it while there is no step.

        Raises:
            DesyncError: another rank's past differs from rank 0's.
        """
        self._ranks.require_equal(self._checksum, f"the checksum of step {self._completed_step}")

    def _check_past(self, batch: Batch) -> None:
        if batch.step != self._completed_step + 1:
            raise DesyncError(
                f"rank {self._ranks.rank} got step {batch.step} after step {self._completed_step}; a step was lost"
            )
        if batch.checked_step == self._completed_step and batch.checksum != self._checksum:
            raise DesyncError(
                f"rank {self._ranks.rank} has checksum {self._checksum:#010x} for step {self._completed_step}, "
                f"rank 0 has {batch.checksum:#010x}: the ranks have drifted apart"
            )

    def _attention(self, inputs: StepInputs) -> StepAttention:
        architecture = self._decoder.architecture
        return StepAttention(
            inputs.layout,
            self._shard,
            self._ranks,
            num_heads=architecture.num_heads,
            windows=architecture.layer_windows,
            backend=self._backend,
        )

    def _sample(
        self, step: int, hidden_NC: torch.Tensor, rows: SampledRows, prompt_logprobs: dict[int, Logprobs]
    ) -> StepResult:
        """Rank 0 samples; one small broadcast tells every rank. The others know no more than the tokens."""
        sampled = [self._live[sequence_id] for sequence_id in rows.sequence_ids]
        if not sampled:
            return StepResult(step, [], prompt_logprobs=prompt_logprobs)
        hidden_MC = self._sampled_hidden(hidden_NC, rows)
        if self._ranks.rank != 0:
            tokens_M = torch.empty(len(sampled), dtype=torch.int64, device=self._ranks.device)
            return StepResult(step, self._tell(tokens_M, sampled))
        logits_MV = self._decoder.logits(hidden_MC)
        adjusted_MV, failed = self._adjustments.adjust(logits_MV, rows.sequence_ids, sampled)
        draws = [Draw(s.sampling, s.seed, s.num_tokens - s.num_prompt_tokens) for s in sampled]
        tokens_M = sample(adjusted_MV, draws)
        logprobs = _logprobs(logits_MV, tokens_M, sampled)
        token_ids = self._tell(tokens_M, sampled)
        complete = self._adjustments.accept(rows.sequence_ids, token_ids)
        return StepResult(step, token_ids, logprobs, prompt_logprobs, complete, failed)

    def _tell(self, tokens_M: torch.Tensor, sampled: list[LiveSequence]) -> list[int]:
        token_ids = self._ranks.broadcast_from_rank_0(tokens_M).tolist()
        for sequence, token_id in zip(sampled, token_ids, strict=True):
            sequence.append_token(token_id)
        return token_ids

    def _sampled_hidden(self, hidden_NC: torch.Tensor, sampled: SampledRows) -> torch.Tensor:
        """Hidden states of the sampling rows. Every rank has the decode rows; a prefill row comes from its owner."""
        decode_MC = hidden_NC[sampled.decode_rows]
        if not sampled.prefill_owners:
            return decode_MC
        if hidden_NC.shape[0] == 0:  # this rank owns nothing of the step
            hidden_NC = hidden_NC.new_zeros((1, hidden_NC.shape[1]))
        by_rank_RMC = self._ranks.all_gather(hidden_NC[sampled.prefill_rows])
        rows = torch.arange(len(sampled.prefill_owners))
        return torch.cat([decode_MC, by_rank_RMC[sampled.prefill_owners, rows]])


def _logprobs(logits_MV: torch.Tensor, tokens_M: torch.Tensor, sampled: list[LiveSequence]) -> dict[int, Logprobs]:
    """By row, of the rows that ask for them."""
    wanted = {m: s.sampling.logprobs for m, s in enumerate(sampled) if s.sampling.logprobs is not None}
    if not wanted:
        return {}
    rows = list(wanted)
    packed = score(logits_MV[rows], tokens_M[rows], max(wanted.values())).cpu().numpy()
    return {m: unpack(packed[i : i + 1], num_top) for i, (m, num_top) in enumerate(wanted.items())}
