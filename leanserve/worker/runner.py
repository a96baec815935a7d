"""A rank's executor: applies step messages in order and computes them. Every rank runs the same code."""

import torch

from lean_attention import Backend
from leanserve.attention.kv_shard import KvShard
from leanserve.attention.step import StepAttention
from leanserve.contracts.batch import Batch, StepResult, step_checksum
from leanserve.contracts.errors import DesyncError
from leanserve.distributed.ranks import Ranks
from leanserve.model.decoder import Decoder
from leanserve.worker.inputs import SampledRows, StepInputs, build_inputs
from leanserve.worker.sampler import Draw, sample
from leanserve.worker.sequences import LiveSequences

__all__ = ["Runner"]


class Runner:
    """Executes steps over this rank's shard.

    Args:
        backend: attention backend, None for the device's own.
    """

    def __init__(self, decoder: Decoder, shard: KvShard, ranks: Ranks, *, backend: Backend | None = None) -> None:
        self._decoder = decoder
        self._shard = shard
        self._ranks = ranks
        self._backend: Backend | None = backend
        self._live = LiveSequences(ranks.rank, shard.page_tokens)
        self._completed_step = 0
        self._checksum = 0

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult:
        """Apply one step message and compute its rows.

        Raises:
            DesyncError: this rank's past differs from rank 0's.
        """
        self._check_past(batch)
        self._live.apply(batch.dropped, batch.started, batch.grants)
        token_ids: list[int] = []
        if batch.rows:
            inputs = build_inputs(batch.rows, self._live, self._shard.page_tokens, self._ranks)
            hidden_NC = self._decoder.forward(
                inputs.tokens_N,
                inputs.layout.positions_N,
                self._attention(inputs),
                prompt_lengths_N=inputs.prompt_lengths_N,
            )
            token_ids = self._next_tokens(hidden_NC, inputs)
        self._completed_step = batch.step
        self._checksum = step_checksum(batch.step, token_ids)
        return StepResult(step=batch.step, token_ids=token_ids)

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

    def _next_tokens(self, hidden_NC: torch.Tensor, inputs: StepInputs) -> list[int]:
        """Rank 0 samples; one small broadcast tells every rank."""
        sampled = [self._live[sequence_id] for sequence_id in inputs.sampled.sequence_ids]
        if not sampled:
            return []
        hidden_MC = self._sampled_hidden(hidden_NC, inputs.sampled)
        if self._ranks.rank == 0:
            draws = [Draw(s.sampling, s.seed, s.num_tokens - s.num_prompt_tokens) for s in sampled]
            tokens_M = sample(self._decoder.logits(hidden_MC), draws)
        else:
            tokens_M = torch.empty(len(sampled), dtype=torch.int64, device=self._ranks.device)
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
