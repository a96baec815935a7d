"""Log-probabilities of generated and of prompt tokens, and sampling options, over ranks: against transformers."""

import math
from itertools import pairwise

import pytest
import torch

from checkpoints import VOCAB_SIZE, checkpoint, hf_logits, random_prompts
from leanserve.contracts.sampling import SamplingParams
from rank_group import Answer, Case, run_cases

LENGTHS = [1, 2, 16, 17, 33, 120]
PROMPTS = random_prompts(LENGTHS, seed=31)
PROMPTS[3] = PROMPTS[4][:17]  # it begins like another
SCORED = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2)
PENALIZED = SamplingParams(
    max_tokens=30,
    seed=3,
    presence_penalty=0.5,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    logit_bias={5: 2.0},
    min_tokens=30,
    logprobs=0,
    prompt_logprobs=0,
)
TOLERANCE = 5e-5
"""Of a log-probability in float32: a logit of this model is below 64, so its rounding is below 1e-5."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return checkpoint(tmp_path_factory, "qwen3", heads=6, kv_heads=2, head_dim=16, layers=2, tied=True)


def cases(model_dir, num_ranks: int) -> dict[str, Case]:
    prompts = [PROMPTS[5], PROMPTS[4], PROMPTS[2], PROMPTS[5][:40]]
    tight = Case(model_dir, prompts, PENALIZED, pages_per_rank=math.ceil(12 / num_ranks), max_batch_tokens=64)
    # Chunks of 13 tokens cut prompts anywhere; some cuts leave one token, which goes through decode.
    return {"chunked": Case(model_dir, PROMPTS, SCORED, max_batch_tokens=13), "tight": tight}


@pytest.fixture(scope="module")
def one_rank(model_dir) -> dict[str, Answer]:
    """With all cases; more ranks repeat two of them."""
    many = cases(model_dir, 1)
    many["in turn"] = Case(model_dir, PROMPTS, SCORED, at_once=False)
    many["ample"] = Case(model_dir, many["tight"].prompts, PENALIZED)
    return dict(zip(many, run_cases(1, list(many.values())), strict=True))


@pytest.fixture(scope="module")
def three_ranks(model_dir) -> dict[str, Answer]:
    many = cases(model_dir, 3)
    return dict(zip(many, run_cases(3, list(many.values())), strict=True))


def check_row(row, logprobs_V: torch.Tensor, token_id: int, num_top: int) -> None:
    logprob, rank, top = row
    assert logprob == pytest.approx(float(logprobs_V[token_id]), abs=TOLERANCE)
    assert rank == pytest.approx(1 + int((logprobs_V > logprobs_V[token_id] + TOLERANCE).sum()), abs=1)
    assert len(top) == num_top
    for (top_id, top_logprob), truth in zip(top, logprobs_V.topk(num_top).values.tolist(), strict=True):
        assert top_logprob == pytest.approx(truth, abs=TOLERANCE)
        assert top_logprob == pytest.approx(float(logprobs_V[top_id]), abs=TOLERANCE)
    assert all(first[1] >= second[1] for first, second in pairwise(top))
    if rank <= num_top:
        assert token_id in [top_id for top_id, _ in top]


@pytest.mark.parametrize(
    ("ranks", "case"), [("one_rank", "chunked"), ("one_rank", "in turn"), ("three_ranks", "chunked")]
)
def test_every_token_has_the_log_probability_that_transformers_gives(request, model_dir, ranks, case):
    answer = request.getfixturevalue(ranks)[case]
    assert answer.finish_reasons == ["length"] * len(PROMPTS)
    assert answer.cached_tokens == [0] * len(PROMPTS), "a scored prompt is computed, not found in the cache"
    for index, prompt in enumerate(PROMPTS):
        token_ids = prompt + answer.token_ids[index]
        truth_NV = torch.log_softmax(hf_logits(model_dir, token_ids), dim=-1)
        assert len(answer.prompt_logprobs[index]) == len(prompt) - 1
        assert len(answer.logprobs[index]) == 4
        rows = answer.prompt_logprobs[index] + answer.logprobs[index]
        for place, row in enumerate(rows):
            num_top = 2 if place < len(prompt) - 1 else 3
            check_row(row, truth_NV[place], token_ids[place + 1], num_top)
    assert answer.pages_left == 0


@pytest.mark.parametrize("ranks", ["one_rank", "three_ranks"])
def test_options_and_scores_survive_preemption(request, one_rank, ranks):
    ample, tight = one_rank["ample"], request.getfixturevalue(ranks)["tight"]
    assert (ample.preemptions, ample.pages_left, tight.pages_left) == (0, 0, 0)
    assert tight.preemptions > 0
    assert tight.token_ids == ample.token_ids
    for kept, expected in ((tight.prompt_logprobs, ample.prompt_logprobs), (tight.logprobs, ample.logprobs)):
        for rows, expected_rows in zip(kept, expected, strict=True):
            assert [row[0] for row in rows] == pytest.approx([row[0] for row in expected_rows], abs=TOLERANCE)


def test_penalties_change_what_is_chosen_as_the_formula_says(model_dir):
    """The greedy choice under the penalties, token by token, from transformers' logits."""
    bias = {5: 12.0, 9: 11.0}
    sampling = SamplingParams(
        temperature=0, max_tokens=10, repetition_penalty=1.5, frequency_penalty=2.0, logit_bias=bias
    )
    [answer] = run_cases(1, [Case(model_dir, [PROMPTS[4]], sampling)])
    prompt, outputs = PROMPTS[4], answer.token_ids[0]
    unpenalized = []
    for count in range(10):
        logits = hf_logits(model_dir, prompt + outputs[:count])[-1].clone()
        logits[list(bias)] += torch.tensor(list(bias.values()))
        unpenalized.append(int(logits.argmax()))
        seen = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        seen[prompt + outputs[:count]] = True
        logits = torch.where(seen, torch.where(logits > 0, logits / 1.5, logits * 1.5), logits)
        logits -= 2 * torch.bincount(torch.tensor(outputs[:count], dtype=torch.int64), minlength=VOCAB_SIZE)
        assert outputs[count] == int(logits.argmax())
    assert unpenalized != outputs
