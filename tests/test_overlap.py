"""Steps that overlap: each is launched before the tokens of the one before are known, and the tokens are the same.

Some of it runs on three ranks in `test_exactness`, whose ranks are there already."""

from dataclasses import replace

import pytest
from msgspec.structs import replace as wish

from checkpoints import checkpoint, hf_greedy, random_prompts
from leanserve.bundled import bundled_model_dir
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from rank_group import Answer, Case, run_cases

PAGE = 16
LENGTHS = [1, PAGE - 1, PAGE, PAGE + 1, 300, 2, 33, 64, 65, 100, 129, 7, 250, 31, 48, 5]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def greedy_cases(model_dir, num_ranks: int) -> dict[str, Case]:
    """Whose tokens are those of transformers, or for who is aborted or stopped, the first of them."""
    head, *tails = random_prompts([70, 9, 40, 1, 25, 60, 33, 17, 5], seed=12)
    turns = [head, head + tails[0], head + tails[1], head]
    together = Case(model_dir, random_prompts(LENGTHS, seed=2), GREEDY, page_tokens=PAGE)
    # In the midst of some completions, at a page's first and last token too.
    stops = tuple(sorted({tokens[place] for tokens, place in zip(hf(together), (4, 15, 16, 17), strict=False)}))
    cases = {
        "together": together,
        "a pool that some must leave": Case(
            model_dir,
            [head + tail for tail in tails],
            wish(GREEDY, max_tokens=40),
            page_tokens=PAGE,
            pages_per_rank=-(-21 // num_ranks),
        ),
        "a prefix in common": Case(model_dir, turns, GREEDY, at_once=False, page_tokens=PAGE),
        "copies of one": Case(model_dir, [head] * 4, GREEDY, page_tokens=PAGE),
        "stop tokens": replace(together, sampling=wish(GREEDY, stop_token_ids=stops)),
        "aborts": replace(together, abort_after=5),
    }
    if num_ranks == 1:
        cases["small steps"] = replace(together, max_batch_tokens=17)
    return cases


def hf(case: Case) -> list[list[int]]:
    return hf_greedy(case.model_dir, case.prompts, case.sampling.max_tokens)


def other_cases(model_dir) -> list[Case]:
    """Whose tokens are those of steps in turn."""
    prompts = random_prompts([20, 33, 47, 12], seed=7)
    plain = Case(model_dir, prompts, SamplingParams(max_tokens=12, seed=11), page_tokens=PAGE)
    regex = StructuredOutputsParams(regex="[a-z]{3} [0-9]{2}")
    return [
        replace(plain, prompts=[prompts[2]] * 4, sampling=wish(plain.sampling, top_k=30), seeds=(11, -3, 2**62, 0)),
        replace(plain, sampling=wish(plain.sampling, top_p=0.95, repetition_penalty=1.4, min_tokens=9)),
        replace(plain, sampling=wish(GREEDY, presence_penalty=1.5, frequency_penalty=0.8)),
        replace(plain, sampling=wish(GREEDY, logprobs=2, prompt_logprobs=1)),
        Case(bundled_model_dir(), [[300, 301], [303]], wish(plain.sampling, structured_outputs=regex)),
    ]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return checkpoint(tmp_path_factory, "qwen3", heads=9, kv_heads=3, head_dim=16, hidden=63)


@pytest.fixture(scope="module")
def in_turn(model_dir):
    return run_cases(1, other_cases(model_dir))


@pytest.mark.parametrize("num_ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_tokens_are_those_of_steps_in_turn(model_dir, in_turn, num_ranks):
    greedy, others = greedy_cases(model_dir, num_ranks), other_cases(model_dir)
    answers = run_cases(num_ranks, [replace(case, overlap=True) for case in [*greedy.values(), *others]])
    for answer in answers:
        assert answer.num_ahead > 0
        assert answer.pages_left == 0
    by_name = dict(zip(greedy, answers, strict=False))
    for name, case in greedy.items():
        stops = case.sampling.stop_token_ids or ()
        for index, expected in enumerate(hf(case)):
            tokens, reason = by_name[name].token_ids[index], by_name[name].finish_reasons[index]
            assert tokens == expected[: len(tokens)], name
            ends = [place for place, token in enumerate(expected, 1) if token in stops]
            assert len(tokens) == {"length": len(expected), "stop": min(ends, default=0), "abort": 5}[reason], name
            assert (reason == "stop") == bool(ends), name
    assert by_name["a pool that some must leave"].preemptions > 0
    assert by_name["a prefix in common"].cached_tokens == [0, 70, 70, 69]
    assert by_name["copies of one"].cached_tokens == [0, 69, 69, 69]
    assert by_name["stop tokens"].finish_reasons.count("stop") >= 3
    assert by_name["aborts"].finish_reasons.count("abort") == 6
    for ahead, alone in zip(answers[len(greedy) :], in_turn, strict=True):
        assert alone.num_ahead == 0
        assert ahead.token_ids == alone.token_ids
        assert ahead.finish_reasons == alone.finish_reasons
        assert logprobs_of(ahead) == pytest.approx(logprobs_of(alone), abs=1e-4)
    assert logprobs_of(answers[-2])


def logprobs_of(answer: Answer) -> list[float]:
    scores = [score for row in [*answer.logprobs, *answer.prompt_logprobs] for score in row]
    return [number for own, rank, top in scores for number in (own, rank, *(n for pair in top for n in pair))]
