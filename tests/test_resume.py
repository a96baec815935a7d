"""A request that outlives its engine goes on with the very tokens it would have had, whatever it asked for."""

from dataclasses import replace

import pytest

from checkpoints import VOCAB_SIZE, checkpoint, random_prompts
from leanserve.bundled import bundled_model_dir
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from rank_group import Case, run_cases

TOKENS = 24
WISHES = {
    "greedy": SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True),
    "seeded": SamplingParams(temperature=1.3, top_p=0.95, seed=11, max_tokens=TOKENS, ignore_eos=True),
    "penalties": SamplingParams(
        temperature=0,
        presence_penalty=1.5,
        frequency_penalty=0.8,
        repetition_penalty=1.4,
        max_tokens=TOKENS,
        ignore_eos=True,
    ),
    "min-tokens": SamplingParams(
        temperature=1.0, seed=3, min_tokens=15, stop_token_ids=tuple(range(0, VOCAB_SIZE, 4)), max_tokens=TOKENS
    ),
    "biased": SamplingParams(temperature=0.7, seed=4, logit_bias={5: 4.0, 6: 3.5}, max_tokens=TOKENS, ignore_eos=True),
}


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_the_tokens_are_those_of_an_undisturbed_run(wish, tmp_path_factory) -> None:
    case = Case(checkpoint(tmp_path_factory, "llama"), random_prompts([3, 40, 70], seed=21), wish)
    check(case, (1, 7, 13))


def test_a_grammar_is_followed_from_where_it_was() -> None:
    schema = {
        "type": "object",
        "properties": {"key": {"type": "string", "maxLength": 8}, "locker": {"type": "integer"}},
        "required": ["key", "locker"],
        "additionalProperties": False,
    }
    wish = SamplingParams(
        temperature=1.0, seed=2, max_tokens=40, structured_outputs=StructuredOutputsParams(json=schema)
    )
    check(Case(bundled_model_dir(), [[300, 301, 302]], wish), (1, 4))


def check(case: Case, cuts: tuple[int, ...]) -> None:
    (whole,) = run_cases(1, [case])
    shortest = min(len(tokens) for tokens in whole.token_ids)
    assert shortest > max(cuts)
    for cut in cuts:
        generated = [tokens[:cut] for tokens in whole.token_ids]
        (rest,) = run_cases(1, [replace(case, generated=generated)])
        assert [g + r for g, r in zip(generated, rest.token_ids, strict=True)] == whole.token_ids
        assert rest.finish_reasons == whole.finish_reasons
        assert rest.pages_left == 0
