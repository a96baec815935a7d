"""A rank's executor: applies step messages in order and computes them. Every rank runs the same code."""

from collections.abc import Callable

import torch

from lean_attention import Backend
from leanserve.attention.kv_shard import KvShard
from leanserve.attention.step import StepAttention
from leanserve.contracts.batch import Batch, Row, StepResult, StepTimes, step_checksum
from leanserve.contracts.errors import DesyncError
from leanserve.distributed.ranks import Ranks
from leanserve.distributed.stopwatch import Stopwatch
from leanserve.model.decoder import Decoder
from leanserve.worker.decode_rows import DecodeRows
from leanserve.worker.graphs import DecodeGraphs, capture_sizes
from leanserve.worker.inputs import PrefillSamples, StepInputs, decode_inputs, mixed_inputs, split_rows
from leanserve.worker.sampler import Draw, sample
from leanserve.worker.sequences import LiveSequences

__all__ = ["Runner"]


class Runner:
    """Executes steps over this rank's shard.

    Args:
        max_sequences: that decode at once.
        max_context_tokens: of one sequence, over all ranks.
        backend: attention backend, None for the device's own.
    """

    def __init__(
        self,
        decoder: Decoder,
        shard: KvShard,
        ranks: Ranks,
        *,
        max_sequences: int,
        max_context_tokens: int,
        backend: Backend | None = None,
    ) -> None:
        self._decoder = decoder
        self._shard = shard
        self._ranks = ranks
        self._backend: Backend | None = backend
        self._live = LiveSequences(ranks.rank, shard.page_tokens)
        self._max_sequences = max_sequences
        self._decode_rows = DecodeRows(
            max_rows=max_sequences,
            max_pages=min(-(-max_context_tokens // shard.page_tokens), shard.num_pages),
            page_tokens=shard.page_tokens,
            device=ranks.device,
        )
        self.graphs: DecodeGraphs | None = None
        """Of `decode_eagerly`, once they are captured."""
        self._completed_step = 0
        self._checksum = 0
        self._in_forward = Stopwatch(ranks.device)
        self._in_sampling = Stopwatch(ranks.device)
        ranks.in_collectives.take_s()  # what loading took is not the first step's

    @torch.inference_mode()
    def capture_graphs(
        self, capture: Callable[[Callable[[], None]], Callable[[], None]], progress: Callable[[int, int], None]
    ) -> None:
        """From now on, replay steps that hold decode rows alone. Every rank calls it, before the first step.

        Args:
            capture, progress: as in `DecodeGraphs`.
        """
        self.graphs = DecodeGraphs(self.decode_eagerly, capture_sizes(self._max_sequences), capture, progress)
        self._ranks.in_collectives.take_s()

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult:
        """Apply one step message and compute its rows.

        Raises:
            DesyncError: this rank's past differs from rank 0's.
        """
        self._check_past(batch)
        self._live.apply(batch.dropped, batch.started, batch.grants)
        self._shard.copy_pages([(copy.source, copy.target) for copy in batch.copies if copy.rank == self._ranks.rank])
        token_ids = self._next_tokens(batch.rows) if batch.rows else []
        self._completed_step = batch.step
        self._checksum = step_checksum(batch.step, token_ids)
        return StepResult(step=batch.step, token_ids=token_ids, times=self._times())

    def _times(self) -> StepTimes:
        watches = (self._in_forward, self._in_sampling, self._ranks.in_collectives)
        return StepTimes(*(watch.take_s() for watch in watches))

    def _next_tokens(self, rows: list[Row]) -> list[int]:
        """Compute a step: one token for each sampling row."""
        decode_rows, prefill_rows = split_rows(rows)
        with self._in_forward:
            self._decode_rows.arrange(decode_rows, [self._live[row.sequence_id] for row in decode_rows])
            if prefill_rows:
                logits_MV = self._decode_and_prefill(len(decode_rows), prefill_rows)
            else:
                logits_MV = (self.graphs or self.decode_eagerly)(len(decode_rows))
        if not (sampling_rows := [row for row in rows if row.samples]):
            return []
        with self._in_sampling:
            tokens_M = self._sample(logits_MV, sampling_rows)
            self._decode_rows.advance(tokens_M[: len(decode_rows)])
        token_ids = tokens_M.tolist()
        for row, token_id in zip(sampling_rows, token_ids, strict=True):
            self._live[row.sequence_id].append_token(token_id)
        return token_ids

    @torch.inference_mode()
    def decode_eagerly(self, num_rows: int) -> torch.Tensor | None:
        """Compute the first `num_rows` decode rows as they stand; twice gives the same as once.

        This is what a graph captures: it neither waits for the device nor reads from it, and it launches the same
        whatever the rows hold. (Not so with the portable attention, which plans on the host.)

        Returns:
            Logits [B, V] on rank 0, None on the others.
        """
        inputs = decode_inputs(self._decode_rows.inputs(num_rows), self._ranks.size)
        return self._decoder.logits(self._hidden(inputs))

    def _decode_and_prefill(self, num_decode: int, prefill_rows: list[Row]) -> torch.Tensor | None:
        """Rank 0's logits of all rows that sample; None where there are none."""
        decode = self._decode_rows.inputs(num_decode)
        inputs = mixed_inputs(decode, prefill_rows, self._live, self._shard.page_tokens, self._ranks)
        hidden_NC = self._hidden(inputs)
        hidden_MC = torch.cat([hidden_NC[:num_decode], self._prefill_hidden(hidden_NC, inputs.prefill_samples)])
        return self._decoder.logits(hidden_MC) if hidden_MC.shape[0] else None

    def _hidden(self, inputs: StepInputs) -> torch.Tensor:
        """The model's states [N, C] of this rank's tokens."""
        architecture = self._decoder.architecture
        attention = StepAttention(
            inputs.layout,
            self._shard,
            self._ranks,
            num_heads=architecture.num_heads,
            windows=architecture.layer_windows,
            backend=self._backend,
        )
        return self._decoder.forward(
            inputs.tokens_N,
            inputs.layout.positions_N,
            attention,
            prompt_lengths_N=inputs.prompt_lengths_N,
            spread=inputs.spread,
        )

    def _prefill_hidden(self, hidden_NC: torch.Tensor, samples: PrefillSamples) -> torch.Tensor:
        """Hidden states of the sampling prefill rows, each from the rank that has it."""
        if not samples.owners:
            return hidden_NC[:0]
        if hidden_NC.shape[0] == 0:  # this rank owns nothing of the step
            hidden_NC = hidden_NC.new_zeros((1, hidden_NC.shape[1]))
        by_rank_RMC = self._ranks.all_gather(hidden_NC[samples.rows])
        return by_rank_RMC[samples.owners, torch.arange(len(samples.owners))]

    def _sample(self, logits_MV: torch.Tensor | None, rows: list[Row]) -> torch.Tensor:
        """The next token of each row on every rank, int64 [M]: rank 0 draws, one small broadcast tells the others."""
        if logits_MV is None:
            tokens_M = torch.empty(len(rows), dtype=torch.int64, device=self._ranks.device)
        else:
            tokens_M = sample(logits_MV, [self._draw(row) for row in rows])
        return self._ranks.broadcast_from_rank_0(tokens_M)

    def _draw(self, row: Row) -> Draw:
        sequence = self._live[row.sequence_id]
        return Draw(sequence.sampling, sequence.seed, row.start + row.count - sequence.num_prompt_tokens)

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
