"""What requests' options do to the logits before a token is drawn: biases, penalties, and tokens that may not come.

Rank 0 alone needs this. Rows without such options pass through untouched, and cost nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from leanserve.contracts.batch import NewSequence
from leanserve.contracts.errors import RequestError
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from leanserve.grammars.grammar import compile_grammar
from leanserve.worker.transfers import upload

__all__ = ["Adjustments"]

_MAX_COMPILED = 16
"""Grammars kept, so that samples of one request, and requests of one client, compile once."""

_RULED_OUT = -1e30
"""For a token that may not come unless nothing else may: its probability is 0. What a grammar forbids is -inf."""


class Adjustments:
    """The options of the live sequences that have any.

    Args:
        eos_token_ids: the model's own end tokens.
        grammar_tokenizer: None where the model has no tokenizer; structured outputs then fail, one by one.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        device: torch.device,
        grammar_tokenizer: LLTokenizer | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._grammar_tokenizer = grammar_tokenizer
        self._rows: dict[int, _Row] = {}
        self._compiler = ThreadPoolExecutor(1, "grammar")
        self._compiled: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()
        """The newest grammars, at their start; the compiler's thread alone touches them."""

    def close(self) -> None:
        """No sequence is live any more. Grammars that nobody waits for are not compiled; one that is being compiled is
        not waited for."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def apply(self, dropped: list[int], started: list[NewSequence]) -> None:
        """Follow a step message: forget the dropped, look at the started. A grammar begins to compile."""
        for sequence_id in dropped:
            self._rows.pop(sequence_id, None)
        for new in started:
            if _adjusts(new.sampling):
                self._rows[new.sequence_id] = self._row(new)

    def adjust(
        self, logits_MV: torch.Tensor, sequence_ids: list[int], num_outputs: list[int]
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """The logits to draw from, and the sequences that cannot go on, with the reason.

        `logits_MV` is left as it is; where no row has an option it is returned itself. `num_outputs` is how many tokens
        each has generated.
        """
        failed: dict[int, str] = {}
        adjusted_MV = logits_MV
        if not self._rows:
            return adjusted_MV, failed
        for m, (sequence_id, outputs) in enumerate(zip(sequence_ids, num_outputs, strict=True)):
            row = self._rows.get(sequence_id)
            if row is None:
                continue
            if adjusted_MV is logits_MV:
                adjusted_MV = logits_MV.clone()
            try:
                row.adjust(adjusted_MV[m], outputs)
            except RequestError as error:
                failed[sequence_id] = str(error)
        return adjusted_MV, failed

    def count(self, sequence_ids: list[int], tokens_M: torch.Tensor) -> None:
        """Note the tokens that were drawn where penalties count them, on the device: int64."""
        if not self._rows:
            return
        for m, sequence_id in enumerate(sequence_ids):
            row = self._rows.get(sequence_id)
            if row is not None:
                row.count(tokens_M[m : m + 1])

    def accept(self, sequence_ids: list[int], token_ids: list[int]) -> set[int]:
        """Note the tokens that were drawn where grammars read them, on the host, before the next `adjust`. Returns the
        sequences whose structured output is complete with them."""
        complete: set[int] = set()
        for sequence_id, token_id in zip(sequence_ids, token_ids, strict=True):
            row = self._rows.get(sequence_id)
            if row is not None and row.accept(token_id):
                complete.add(sequence_id)
        return complete

    def _row(self, new: NewSequence) -> "_Row":
        token_ids = np.frombuffer(new.token_ids, np.int32)
        prompt, outputs = token_ids[: new.num_prompt_tokens], token_ids[new.num_prompt_tokens :]
        end_token_ids = new.sampling.end_token_ids(self._eos_token_ids)
        row = _Row(new.sampling, prompt, outputs, sorted(end_token_ids), self._vocab_size, self._device)
        if new.sampling.structured_outputs is not None:
            row.matcher = self._compiler.submit(self._compile, new.sampling, outputs.tolist())
            if new.sampling.ignore_eos:
                row.never_ids = upload(np.array(self._eos_token_ids, np.int64), self._device)
        return row

    def _compile(self, sampling: SamplingParams, output_token_ids: list[int]) -> LLMatcher:
        """A matcher behind the tokens that were generated before a preemption."""
        assert sampling.structured_outputs is not None
        if self._grammar_tokenizer is None:
            raise RequestError("structured_outputs needs a tokenizer, and this model has none")
        wish = sampling.structured_outputs
        if wish not in self._compiled:
            self._compiled[wish] = compile_grammar(wish, self._grammar_tokenizer)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(wish)
        matcher = self._compiled[wish].deep_copy()
        matcher.consume_tokens(output_token_ids)
        return matcher


def _adjusts(sampling: SamplingParams) -> bool:
    return bool(
        sampling.logit_bias
        or sampling.allowed_token_ids is not None
        or sampling.min_tokens
        or sampling.structured_outputs is not None
        or _penalizes(sampling)
    )


def _penalizes(sampling: SamplingParams) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)


class _Row:
    """One sequence's options, on the device. V vocabulary."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: np.ndarray,
        outputs: np.ndarray,
        end_token_ids: list[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.sampling = sampling
        self.matcher: Future[LLMatcher] | None = None
        self.never_ids: torch.Tensor | None = None
        """int64: ruled out as long as the grammar allows anything else."""

        def ids(token_ids: Iterable[int]) -> torch.Tensor:
            return upload(np.array([t for t in token_ids if t < vocab_size], np.int64), device)

        self._end_ids = ids(end_token_ids)
        bias = {t: value for t, value in (sampling.logit_bias or {}).items() if t < vocab_size}
        self._bias_ids = ids(bias)
        self._biases = upload(np.array(list(bias.values()), np.float32), device)
        self._ruled_out_V: torch.Tensor | None = None
        if sampling.allowed_token_ids is not None:
            self._ruled_out_V = torch.ones(vocab_size, dtype=torch.bool, device=device)
            self._ruled_out_V.index_fill_(0, ids(sampling.allowed_token_ids), False)
        self._counts_V: torch.Tensor | None = None
        self._seen_V: torch.Tensor | None = None
        if _penalizes(sampling):
            counts = np.bincount(outputs, minlength=vocab_size)
            self._counts_V = upload(counts.astype(np.float32), device)
            seen = counts > 0
            seen[prompt] = True
            self._seen_V = upload(seen, device)
            self._one_1 = torch.ones(1, dtype=torch.float32, device=device)

    def adjust(self, logits_V: torch.Tensor, num_outputs: int) -> None:
        """Change a row's logits in place.

        Penalties as vLLM and transformers define them: `logit / r` where it is positive and `logit * r` where it is
        not, for tokens in the prompt or the outputs (Keskar et al. 2019); then minus the frequency penalty times the
        token's count in the outputs, minus the presence penalty where the count is not 0.

        Raises:
            RequestError: its grammar cannot be compiled, or has run into a limit.
        """
        sampling = self.sampling
        if self._bias_ids.numel():
            logits_V.index_add_(0, self._bias_ids, self._biases)
        if self._counts_V is not None and self._seen_V is not None:
            factor = sampling.repetition_penalty
            repeated_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
            logits_V.copy_(torch.where(self._seen_V, repeated_V, logits_V))
            logits_V -= sampling.frequency_penalty * self._counts_V
            logits_V -= sampling.presence_penalty * (self._counts_V > 0)
        if self._ruled_out_V is not None:
            logits_V.masked_fill_(self._ruled_out_V, _RULED_OUT)
        if num_outputs < sampling.min_tokens:
            logits_V.index_fill_(0, self._end_ids, _RULED_OUT)
        if self.never_ids is not None:
            logits_V.index_fill_(0, self.never_ids, _RULED_OUT)
        if self.matcher is not None:
            logits_V.masked_fill_(self._forbidden(logits_V), -torch.inf)

    def count(self, token_1: torch.Tensor) -> None:
        """Note a token for the penalties: int64 [1]."""
        if self._counts_V is not None and self._seen_V is not None:
            self._counts_V.index_add_(0, token_1, self._one_1)
            self._seen_V.index_fill_(0, token_1, True)

    def accept(self, token_id: int) -> bool:
        """Note a token for the grammar. Returns whether the structured output is complete with it."""
        if self.matcher is None or self.matcher.exception() is not None:
            return False
        matcher = self.matcher.result()
        matcher.consume_token(token_id)
        return matcher.is_stopped() and not matcher.is_error()

    def _forbidden(self, logits_V: torch.Tensor) -> torch.Tensor:
        """bool [V]: tokens after which the text could not match the grammar any more."""
        assert self.matcher is not None
        matcher = self.matcher.result()
        allowed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise RequestError(f"structured_outputs: the grammar cannot be followed further: {matcher.get_error()}")
        forbidden = np.unpackbits(allowed, bitorder="little")[: logits_V.shape[0]] == 0
        missing = logits_V.shape[0] - len(forbidden)
        if missing > 0:
            forbidden = np.concatenate([forbidden, np.ones(missing, bool)])
        return upload(forbidden, logits_V.device)
