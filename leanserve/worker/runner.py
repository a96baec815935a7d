"""A rank's executor: applies step messages in order and computes them. Every rank runs the same code.

Shapes: M rows of a step that sample, V vocabulary, N tokens that this rank computes, C hidden.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from llguidance import LLTokenizer

from lean_attention import Backend
from leanserve.attention.kv_shard import KvShard
from leanserve.attention.step import StepAttention
from leanserve.contracts.batch import Batch, Row, StepResult, StepTimes, step_checksum
from leanserve.contracts.errors import DesyncError
from leanserve.distributed.ranks import Ranks
from leanserve.distributed.stopwatch import Stopwatch
from leanserve.model.decoder import Decoder
from leanserve.worker.adjustments import Adjustments
from leanserve.worker.decode_rows import DecodeRows
from leanserve.worker.graphs import DecodeGraphs, capture_sizes
from leanserve.worker.inputs import PrefillSamples, StepInputs, decode_inputs, mixed_inputs, split_rows
from leanserve.worker.logprobs import PromptScores, TokenScores, score_prompts, score_tokens
from leanserve.worker.sampler import Draw, sample
from leanserve.worker.sequences import LiveSequence, LiveSequences
from leanserve.worker.transfers import Download, upload

__all__ = ["Runner"]

_NOT_FINITE = -1
"""Instead of a token on its way from rank 0's device to its host: there was nothing to draw from."""


@dataclass(frozen=True)
class _Sampled:
    """What a step samples. The host knows the tokens once they have come down."""

    sequence_ids: list[int]
    sequences: list[LiveSequence]
    tokens_M: Download
    """int64. On rank 0, _NOT_FINITE stands for a token that could not be drawn; every device goes on with 0 there."""
    scores: TokenScores | None = None
    failed: dict[int, str] = field(default_factory=dict)
    """As of StepResult."""


@dataclass(frozen=True)
class _Launched:
    """A step in flight."""

    step: int
    sampled: _Sampled
    prompt_scores: PromptScores | None
    times: StepTimes | None
    """None on a GPU: known when the step is done."""


class Runner:
    """Executes steps over this rank's shard: launches them in order, and collects them in order.

    On a GPU `launch` waits for nothing that the device does, so that the next step can be launched while one runs: what
    that needs of the newest tokens, it finds on the device. On the CPU the host is the device, and `launch` computes.

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
        self._launched_step = 0
        self._in_flight: deque[_Launched] = deque()
        """The oldest first."""
        self._checksums = {0: 0}
        """By step, of the two newest that were collected: the next message names one of them."""
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

    def close(self) -> None:
        """Let go of graphs and threads. Nothing is launched any more."""
        if self.graphs is not None:
            self.graphs.release()
        self._adjustments.close()

    @property
    def steps_in_flight(self) -> list[int]:
        """Launched and not collected, the oldest first."""
        return [launched.step for launched in self._in_flight]

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Apply one step message and begin to compute its rows.

        Raises:
            DesyncError: this rank's past differs from rank 0's.
        """
        self._check_past(batch)
        self._launched_step = batch.step
        self._live.apply(batch.dropped, batch.started, batch.grants)
        copies = [(copy.source, copy.target) for copy in batch.copies if copy.rank == self._ranks.rank]
        if copies:
            self._shard.copy_pages(*upload(np.array(copies, np.int64).T, self._ranks.device))
        if self._ranks.rank == 0:
            self._adjustments.apply(batch.dropped, batch.started)
        sampled, prompt_scores = self._compute(batch.rows)
        on_host = self._ranks.device.type == "cpu"
        self._in_flight.append(_Launched(batch.step, sampled, prompt_scores, self._times() if on_host else None))

    @torch.inference_mode()
    def collect(self) -> StepResult:
        """Wait for the oldest step in flight, the only place where the host waits for the device, and note its tokens.

        Only rank 0's result has more than those.
        """
        launched = self._in_flight.popleft()
        sampled = launched.sampled
        token_ids: list[int] = sampled.tokens_M.wait().tolist()
        not_finite: set[int] = set()
        if _NOT_FINITE in token_ids:
            not_finite = {i for i, t in zip(sampled.sequence_ids, token_ids, strict=True) if t == _NOT_FINITE}
            token_ids = [max(token_id, 0) for token_id in token_ids]
        for sequence, token_id in zip(sampled.sequences, token_ids, strict=True):
            sequence.append_token(token_id)
        self._checksums = {
            launched.step - 1: self._checksums[launched.step - 1],
            launched.step: step_checksum(launched.step, token_ids),
        }
        return StepResult(
            launched.step,
            token_ids,
            times=self._times() if launched.times is None else launched.times,
            logprobs={} if sampled.scores is None else sampled.scores.wait(),
            prompt_logprobs={} if launched.prompt_scores is None else launched.prompt_scores.wait(),
            complete=self._adjustments.accept(sampled.sequence_ids, token_ids),
            failed=sampled.failed,
            not_finite=not_finite,
        )

    def _compute(self, rows: list[Row]) -> tuple[_Sampled, PromptScores | None]:
        """The model over all rows, then one token for each that samples."""
        decode_rows, prefill_rows = split_rows(rows)
        logits_MV, prompt_scores = None, None
        if rows:
            with self._in_forward:
                self._decode_rows.arrange(decode_rows, [self._live[row.sequence_id] for row in decode_rows])
                if prefill_rows:
                    logits_MV, prompt_scores = self._decode_and_prefill(len(decode_rows), prefill_rows)
                else:
                    logits_MV = (self.graphs or self.decode_eagerly)(len(decode_rows))
        return self._sample(logits_MV, [row for row in rows if row.samples]), prompt_scores

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
    ) -> tuple[torch.Tensor | None, PromptScores | None]:
        """Rank 0's logits of all rows that sample (None where there are none), and of prompts that are scored."""
        decode = self._decode_rows.inputs(num_decode)
        inputs = mixed_inputs(decode, prefill_rows, self._live, self._shard.page_tokens, self._ranks)
        hidden_NC = self._hidden(inputs)
        scores = None if inputs.scored is None else score_prompts(self._decoder, hidden_NC, inputs.scored, self._ranks)
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
        num_samples = samples.owners.shape[0]
        if num_samples == 0:
            return hidden_NC[:0]
        if hidden_NC.shape[0] == 0:  # this rank owns nothing of the step
            hidden_NC = hidden_NC.new_zeros((1, hidden_NC.shape[1]))
        by_rank_RMC = self._ranks.all_gather(hidden_NC[samples.rows])
        return by_rank_RMC[samples.owners, torch.arange(num_samples, device=by_rank_RMC.device)]

    def _sample(self, logits_MV: torch.Tensor | None, rows: list[Row]) -> _Sampled:
        """Rank 0 draws; one small broadcast tells every rank. The others know no more than the tokens."""
        sequence_ids = [row.sequence_id for row in rows]
        sequences = [self._live[sequence_id] for sequence_id in sequence_ids]
        if logits_MV is None:
            tokens_M = torch.empty(len(rows), dtype=torch.int64, device=self._ranks.device)
            if rows:
                with self._in_sampling:
                    tokens_M = self._tell(tokens_M, sequences)
            return _Sampled(sequence_ids, sequences, Download(tokens_M))
        with self._in_sampling:
            draws = [
                Draw(s.sampling, s.seed, row.start + row.count - s.num_prompt_tokens)
                for row, s in zip(rows, sequences, strict=True)
            ]
            num_outputs = [draw.index for draw in draws]
            adjusted_MV, failed = self._adjustments.adjust(logits_MV, sequence_ids, num_outputs)
            # One NaN or infinity makes the sum one, and neither is less than infinity.
            finite_M = logits_MV.sum(dim=-1).abs() < torch.inf
            tokens_M = self._tell(torch.where(finite_M, sample(adjusted_MV, draws), 0), sequences)
            self._adjustments.count(sequence_ids, tokens_M)
        scores = score_tokens(logits_MV, tokens_M, sequences)
        drawn_M = torch.where(finite_M, tokens_M, _NOT_FINITE)
        return _Sampled(sequence_ids, sequences, Download(drawn_M), scores, failed)

    def _tell(self, tokens_M: torch.Tensor, sequences: list[LiveSequence]) -> torch.Tensor:
        """Rank 0's tokens on every rank, and where its decode rows find them in the next step."""
        tokens_M = self._ranks.broadcast_from_rank_0(tokens_M)
        self._decode_rows.advance(tokens_M, sequences)
        return tokens_M

    def _times(self) -> StepTimes:
        watches = (self._in_forward, self._in_sampling, self._ranks.in_collectives)
        return StepTimes(*(watch.take_s() for watch in watches))

    def compare_pasts(self) -> None:
        """Every rank calls it while no step is in flight.

        Raises:
            DesyncError: another rank's past differs from rank 0's.
        """
        newest = max(self._checksums)
        self._ranks.require_equal(self._checksums[newest], f"the checksum of step {newest}")

    def _check_past(self, batch: Batch) -> None:
        rank, step = self._ranks.rank, batch.checked_step
        if batch.step != self._launched_step + 1:
            raise DesyncError(f"rank {rank} got step {batch.step} after step {self._launched_step}; a step was lost")
        if step not in self._checksums:
            raise DesyncError(f"rank {rank} has completed step {max(self._checksums)}, rank 0 step {step} already")
        if batch.checksum != self._checksums[step]:
            raise DesyncError(
                f"rank {rank} has checksum {self._checksums[step]:#010x} for step {step}, "
                f"rank 0 has {batch.checksum:#010x}: the ranks have drifted apart"
            )
