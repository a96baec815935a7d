"""What options do to logits: against a slow and plain reference, each row by itself."""

from threading import Event

import numpy as np
import pytest
import torch

from leanserve.bundled import bundled_model_dir
from leanserve.contracts.batch import NewSequence
from leanserve.contracts.sampling import SamplingParams
from leanserve.grammars.grammar import make_grammar_tokenizer
from leanserve.server.tokenizer import Tokenizer
from leanserve.worker.adjustments import Adjustments

V = 60
EOS = (3,)
PROMPT = [5, 6, 6, 59]
OUTPUTS = [7, 5, 7, 7]


def new(sequence_id: int, sampling: SamplingParams, outputs: list[int] = OUTPUTS) -> NewSequence:
    tokens = np.array(PROMPT + outputs, np.int32)
    return NewSequence(sequence_id, tokens.tobytes(), len(PROMPT), sampling, 0)


def adjusted(logits_MV: torch.Tensor, many: list[SamplingParams], outputs: list[int] = OUTPUTS) -> torch.Tensor:
    adjustments = Adjustments(V, EOS, torch.device("cpu"))
    adjustments.apply([], [new(i, sampling, outputs) for i, sampling in enumerate(many)])
    result, failed = adjustments.adjust(logits_MV, list(range(len(many))), [len(outputs)] * len(many))
    assert failed == {}
    return result


def penalized(logits: list[float], sampling: SamplingParams, outputs: list[int]) -> list[float]:
    """The formulas, one token at a time."""
    result = []
    for token_id, logit in enumerate(logits):
        logit += (sampling.logit_bias or {}).get(token_id, 0.0)
        if token_id in PROMPT or token_id in outputs:
            factor = sampling.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        logit -= sampling.frequency_penalty * outputs.count(token_id)
        logit -= sampling.presence_penalty * (token_id in outputs)
        result.append(logit)
    return result


@pytest.fixture
def logits_MV() -> torch.Tensor:
    return torch.randn(5, V, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("outputs", [[], [7], OUTPUTS])
def test_penalties_and_biases_equal_their_formulas(logits_MV, outputs):
    many = [
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.7),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(logit_bias={0: 100, 6: -3.5, 59: -100}),
        SamplingParams(presence_penalty=0.3, frequency_penalty=0.2, repetition_penalty=0.5, logit_bias={7: 2.0}),
    ]
    expected = [penalized(row, s, outputs) for row, s in zip(logits_MV.tolist(), many, strict=True)]
    torch.testing.assert_close(adjusted(logits_MV, many, outputs), torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_row_does_not_see_the_others_and_the_model_s_logits_stay(logits_MV):
    before = logits_MV.clone()
    many = [SamplingParams(), SamplingParams(repetition_penalty=2), SamplingParams(temperature=0), SamplingParams(n=2)]
    many.append(SamplingParams(allowed_token_ids=[1, 2]))
    together = adjusted(logits_MV, many)
    for m, sampling in enumerate(many):
        assert torch.equal(together[m], adjusted(logits_MV[m : m + 1], [sampling])[0])
    assert torch.equal(logits_MV, before)
    assert torch.equal(together[[0, 2, 3]], before[[0, 2, 3]])


def test_rows_without_options_cost_nothing(logits_MV):
    assert adjusted(logits_MV, [SamplingParams(temperature=0), SamplingParams(top_p=0.5)] * 2) is logits_MV


def test_penalties_follow_the_tokens_and_a_restart_changes_nothing(logits_MV):
    sampling = SamplingParams(presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.2)
    adjustments = Adjustments(V, EOS, torch.device("cpu"))
    adjustments.apply([], [new(1, sampling, [])])
    for token_id in OUTPUTS:
        adjustments.count([1], torch.tensor([token_id]))
    grown, _ = adjustments.adjust(logits_MV[:1], [1], [len(OUTPUTS)])
    adjustments.apply([1], [new(1, sampling)])
    restarted, _ = adjustments.adjust(logits_MV[:1], [1], [len(OUTPUTS)])
    assert torch.equal(grown, restarted)


def test_end_tokens_wait_for_min_tokens(logits_MV):
    for outputs, rules_out in (([4] * 2, True), ([4] * 3, False)):
        for ignore_eos, end_token_ids in ((False, [3, 9]), (True, [9])):
            sampling = SamplingParams(min_tokens=3, stop_token_ids=[9], ignore_eos=ignore_eos)
            logits_1V = logits_MV[:1].index_fill(1, torch.tensor(end_token_ids), 1000.0)
            [row] = adjusted(logits_1V, [sampling], outputs)
            assert (row < -1e29).nonzero().flatten().tolist() == (end_token_ids if rules_out else [])
            assert torch.softmax(row.double(), -1)[end_token_ids].sum() == pytest.approx(0 if rules_out else 1)


def test_only_allowed_tokens_are_left(logits_MV):
    [row] = adjusted(logits_MV[:1], [SamplingParams(allowed_token_ids=[8, 50])])
    assert torch.softmax(row.double(), -1).nonzero().flatten().tolist() == [8, 50]
    [row] = adjusted(logits_MV[:1], [SamplingParams(allowed_token_ids=[3], min_tokens=9)])
    assert torch.softmax(row.double(), -1).isfinite().all(), "what rules everything out leaves something"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_dir(bundled_model_dir())
    assert tokenizer is not None
    return tokenizer


def grammar_adjustments(tokenizer: Tokenizer) -> Adjustments:
    vocab_size = tokenizer.vocab_size + 5  # models pad theirs
    masks = make_grammar_tokenizer(tokenizer.backend.to_str(), vocab_size, [1])
    return Adjustments(vocab_size, [1], torch.device("cpu"), masks)


def allowed_ids(adjustments: Adjustments, tokenizer: Tokenizer, sampling: SamplingParams, outputs: list[int]):
    logits = torch.zeros(1, tokenizer.vocab_size + 5)
    result, failed = adjustments.adjust(logits, [1], [len(outputs)])
    assert failed == {}
    return set((result[0] > -1e29).nonzero().flatten().tolist())


@pytest.mark.parametrize("restarts", [False, True])
def test_masks_follow_the_text_over_a_restart(tokenizer, restarts):
    sampling = SamplingParams(structured_outputs={"regex": "(ab|ac)+d?"})
    adjustments = grammar_adjustments(tokenizer)
    adjustments.apply([], [new(1, sampling, [])])
    [a], [b], [d] = (tokenizer.encode(text, add_special_tokens=False) for text in "abd")
    texts = {tokenizer.decode([t]) for t in allowed_ids(adjustments, tokenizer, sampling, [])}
    assert {"a"} <= texts <= {"a", "ab", "ac", "aba", "abac"}
    assert adjustments.accept([1], [a]) == set()
    if restarts:
        adjustments.apply([1], [new(1, sampling, [a])])
    assert b in allowed_ids(adjustments, tokenizer, sampling, [a])
    assert 1 not in allowed_ids(adjustments, tokenizer, sampling, [a]), "the text is not complete"
    assert adjustments.accept([1], [b]) == set()
    after = allowed_ids(adjustments, tokenizer, sampling, [a, b])
    assert {1, a, d} <= after, "it may end here, or go on"
    assert b not in after
    assert adjustments.accept([1], [d]) == {1}, "nothing may follow"


def test_samples_of_one_grammar_go_their_own_ways(tokenizer):
    sampling = SamplingParams(structured_outputs={"regex": "a[0-9]|b[x-z]"})
    adjustments = grammar_adjustments(tokenizer)
    adjustments.apply([], [new(1, sampling, []), new(2, sampling, [])])
    [a], [b], [x] = (tokenizer.encode(text, add_special_tokens=False) for text in "abx")
    assert adjustments.accept([1, 2], [a, b]) == set()
    logits = torch.zeros(2, tokenizer.vocab_size + 5)
    result, failed = adjustments.adjust(logits, [1, 2], [1, 1])
    assert failed == {}
    assert [bool(row[x] > -1e29) for row in result] == [False, True]


def test_ignore_eos_and_min_tokens_go_on_where_the_grammar_can(tokenizer):
    [a] = tokenizer.encode("a", add_special_tokens=False)
    for more in ({"ignore_eos": True}, {"min_tokens": 5}):
        sampling = SamplingParams(structured_outputs={"regex": "a+"}, **more)
        adjustments = grammar_adjustments(tokenizer)
        adjustments.apply([], [new(1, sampling, [a, a])])
        assert 1 not in allowed_ids(adjustments, tokenizer, sampling, [a, a])


def test_the_grammar_has_the_last_word(tokenizer):
    sampling = SamplingParams(structured_outputs={"choice": ["yes"]}, allowed_token_ids=[7])
    adjustments = grammar_adjustments(tokenizer)
    adjustments.apply([], [new(1, sampling, [])])
    logits = torch.zeros(1, tokenizer.vocab_size + 5)
    result, _ = adjustments.adjust(logits, [1], [0])
    assert "yes".startswith(tokenizer.decode([int(result.argmax())]))
    assert torch.softmax(result.double(), -1).isfinite().all()


def test_a_grammar_that_cannot_be_compiled_fails_alone(tokenizer):
    adjustments = grammar_adjustments(tokenizer)
    wishes = [{"regex": "("}, {"json": "[]"}, {"regex": "a"}]
    many = [SamplingParams(structured_outputs=wish) for wish in wishes]
    adjustments.apply([], [new(i, sampling, []) for i, sampling in enumerate(many)])
    logits = torch.zeros(3, tokenizer.vocab_size + 5)
    _, failed = adjustments.adjust(logits, [0, 1, 2], [0] * len(many))
    assert set(failed) == {0, 1}
    assert "unclosed group" in failed[0]
    assert adjustments.accept([0, 1], [5, 5]) == set()


def test_without_a_tokenizer_it_fails_alone():
    adjustments = Adjustments(V, EOS, torch.device("cpu"))
    adjustments.apply([], [new(1, SamplingParams(structured_outputs={"json_object": True}))])
    _, failed = adjustments.adjust(torch.zeros(1, V), [1], [len(OUTPUTS)])
    assert "needs a tokenizer" in failed[1]


def test_closing_ends_the_thread_and_compiles_nothing_more(tokenizer):
    adjustments = grammar_adjustments(tokenizer)
    compiling, may_end = Event(), Event()

    def held(sampling: SamplingParams, output_token_ids: list[int]) -> None:
        compiling.set()
        assert may_end.wait(60)

    adjustments._compile = held
    sampling = SamplingParams(structured_outputs={"regex": "a"})
    adjustments.apply([], [new(1, sampling, []), new(2, sampling, [])])
    assert compiling.wait(60)
    adjustments.close()  # does not wait for the one
    waiting = adjustments._rows[2].matcher
    assert waiting is not None
    assert waiting.cancelled()
    may_end.set()
    for thread in adjustments._compiler._threads:
        thread.join(60)
        assert not thread.is_alive()
