"""A rank's executor: applies step messages in order and computes them. Every rank runs the same code."""

from collections.abc import Callable

import msgspec
import torch
from llguidance import LLTokenizer

from lean_attention import Backend
from leanserve.attention.kv_shard import KvShard
from leanserve.attention.step import StepAttention
from leanserve.contracts.batch import Batch, Row, StepResult, StepTimes, step_checksum
from leanserve.contracts.errors import DesyncError
from leanserve.contracts.logprobs import Logprobs
from leanserve.distributed.ranks import Ranks
from leanserve.distributed.stopwatch import Stopwatch
from leanserve.model.decoder import Decoder
from leanserve.worker.adjustments import Adjustments
from leanserve.worker.decode_rows import DecodeRows
from leanserve.worker.graphs import DecodeGraphs, capture_sizes
from leanserve.worker.inputs import PrefillSamples, StepInputs, decode_inputs, mixed_inputs, split_rows
from leanserve.worker.logprobs import score, score_prompts, unpack
from leanserve.worker.sampler import Draw, sample
from leanserve.worker.sequences import LiveSequence, LiveSequences

__all__ = ["Runner"]


class Runner:
    """Executes steps over this rank's shard.

    Args:
        max_sequences: that decode at once.
        max_context_tokens: of one sequence, over all ranks.
        grammar_tokenizer: on rank 0, what structured outputs need; None where the model has no tokenizer.
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
        grammar_tokenizer: LLTokenizer | None = None,
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
        if self._ranks.rank == 0:
            self._adjustments.apply(batch.dropped, batch.started)
        result = self._compute(batch.step, batch.rows) if batch.rows else StepResult(batch.step, [])
        self._completed_step = batch.step
        self._checksum = step_checksum(batch.step, result.token_ids)
        return msgspec.structs.replace(result, times=self._times())

    def _compute(self, step: int, rows: list[Row]) -> StepResult:
        """The model over all rows, then one token for each that samples."""
        decode_rows, prefill_rows = split_rows(rows)
        prompt_logprobs: dict[int, Logprobs] = {}
        with self._in_forward:
            self._decode_rows.arrange(decode_rows, [self._live[row.sequence_id] for row in decode_rows])
            if prefill_rows:
                logits_MV, prompt_logprobs = self._decode_and_prefill(len(decode_rows), prefill_rows)
            else:
                logits_MV = (self.graphs or self.decode_eagerly)(len(decode_rows))
        sampling_rows = [row for row in rows if row.samples]
        if not sampling_rows:
            return StepResult(step, [], prompt_logprobs=prompt_logprobs)
        result = self._sample(step, logits_MV, sampling_rows, num_decode=len(decode_rows))
        return msgspec.structs.replace(result, prompt_logprobs=prompt_logprobs)

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

    def _decode_and_prefill(
        self, num_decode: int, prefill_rows: list[Row]
    ) -> tuple[torch.Tensor | None, dict[int, Logprobs]]:
        """Rank 0's logits of all rows that sample (None where there are none), and of prompts that are scored."""
        decode = self._decode_rows.inputs(num_decode)
        inputs = mixed_inputs(decode, prefill_rows, self._live, self._shard.page_tokens, self._ranks)
        hidden_NC = self._hidden(inputs)
        scores = {} if inputs.scored is None else score_prompts(self._decoder, hidden_NC, inputs.scored, self._ranks)
        hidden_MC = torch.cat([hidden_NC[:num_decode], self._prefill_hidden(hidden_NC, inputs.prefill_samples)])
        return self._decoder.logits(hidden_MC) if hidden_MC.shape[0] else None, scores

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

    def _sample(self, step: int, logits_MV: torch.Tensor | None, rows: list[Row], *, num_decode: int) -> StepResult:
        """Rank 0 draws; one small broadcast tells every rank. The others know no more than the tokens."""
        sequences = [self._live[row.sequence_id] for row in rows]
        if logits_MV is None:
            with self._in_sampling:
                tokens_M = torch.empty(len(rows), dtype=torch.int64, device=self._ranks.device)
                tokens_M = self._tell(tokens_M, num_decode)
            return StepResult(step, self._note(tokens_M, sequences))
        with self._in_sampling:
            sequence_ids = [row.sequence_id for row in rows]
            adjusted_MV, failed = self._adjustments.adjust(logits_MV, sequence_ids, sequences)
            draws = [Draw(s.sampling, s.seed, s.num_tokens - s.num_prompt_tokens) for s in sequences]
            tokens_M = self._tell(sample(adjusted_MV, draws), num_decode)
        logprobs = _logprobs(logits_MV, tokens_M, sequences)
        token_ids = self._note(tokens_M, sequences)
        complete = self._adjustments.accept(sequence_ids, token_ids)
        return StepResult(step, token_ids, logprobs=logprobs, complete=complete, failed=failed)

    def _tell(self, tokens_M: torch.Tensor, num_decode: int) -> torch.Tensor:
        """Rank 0's tokens on every rank, and in its decode rows, where the next step reads them."""
        tokens_M = self._ranks.broadcast_from_rank_0(tokens_M)
        self._decode_rows.advance(tokens_M[:num_decode])
        return tokens_M

    def _note(self, tokens_M: torch.Tensor, sequences: list[LiveSequence]) -> list[int]:
        """The tokens on the host. It waits for the device here, and nowhere else in a step of decode rows."""
        token_ids = tokens_M.tolist()
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            sequence.append_token(token_id)
        return token_ids

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


def _logprobs(logits_MV: torch.Tensor, tokens_M: torch.Tensor, sampled: list[LiveSequence]) -> dict[int, Logprobs]:
    """By row, of the rows that ask for them."""
    wanted = {m: s.sampling.logprobs for m, s in enumerate(sampled) if s.sampling.logprobs is not None}
    if not wanted:
        return {}
    rows = list(wanted)
    packed = score(logits_MV[rows], tokens_M[rows], max(wanted.values())).cpu().numpy()
    return {m: unpack(packed[i : i + 1], num_top) for i, (m, num_top) in enumerate(wanted.items())}
