"""A broken checkpoint: whoever reads the token whose embedding is not finite ends with an error, and nobody else does.

The engine runs on two ranks, and a step more is under way than it knows the tokens of.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoints import VOCAB_SIZE, checkpoint, hf_greedy, random_prompts
from leanserve.contracts.sampling import SamplingParams
from rank_group import Case, run_cases

TOKENS = 8
READS_IT = 1
"""Which prompt has the broken token in its middle. The first one generates it."""
WISHES = {
    "greedy": SamplingParams(temperature=0, max_tokens=TOKENS),
    "drawn": SamplingParams(seed=5, max_tokens=TOKENS, logprobs=2),
    "drawn-from-few": SamplingParams(seed=6, top_k=20, top_p=0.9, min_p=0.01, max_tokens=TOKENS),
    "penalized": SamplingParams(temperature=0, frequency_penalty=1.5, min_tokens=3, max_tokens=TOKENS),
}


def broken(model_dir: Path, tensor: str, row: int, value: float, directory: Path) -> Path:
    """A copy of a checkpoint in which one number is `value`."""
    shutil.copytree(model_dir, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[tensor][row, 3] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_only_who_reads_the_broken_token_ends_with_an_error(tmp_path_factory, tmp_path) -> None:
    sound = checkpoint(tmp_path_factory, "llama")
    prompts = random_prompts([20, 40, 33, 5], seed=8)
    first = hf_greedy(sound, prompts[:1], TOKENS)[0]
    seen = {*prompts[0], *first[:2]}
    generated = next(place for place, token in enumerate(first[:-1]) if token not in seen)
    token_id = first[generated]
    prompts = [[(t + 1) % VOCAB_SIZE if t == token_id else t for t in prompt] for prompt in prompts]
    prompts[READS_IT][17] = token_id
    model_dir = broken(sound, "model.embed_tokens.weight", token_id, torch.nan, tmp_path / "nan")
    whole = Case(model_dir, prompts, WISHES["greedy"], overlap=True)
    cases = [replace(whole, sampling=wish) for wish in WISHES.values()]
    # Pages that held what is not finite are taken again, and the prompt's beginning is not found in the cache.
    again = replace(
        whole, prompts=[prompts[READS_IT], prompts[READS_IT][:17] + [3] * 9], at_once=False, pages_per_rank=3
    )
    undisturbed = replace(again, model_dir=sound, prompts=again.prompts[1:])
    infinite = replace(whole, model_dir=broken(sound, "lm_head.weight", 7, torch.inf, tmp_path / "inf"))
    *answers, twice, once, all_failed = run_cases(2, [*cases, again, undisturbed, infinite])

    for answer, expected in zip(answers, run_cases(1, [replace(c, model_dir=sound) for c in cases]), strict=True):
        for index, tokens in enumerate(answer.token_ids):
            alone = expected.token_ids[index]
            num_given = 0 if index == READS_IT else alone.index(token_id) + 1 if token_id in alone[:-1] else TOKENS
            assert tokens == alone[:num_given]
            assert answer.finish_reasons[index] == ("length" if num_given == TOKENS else "error")
        assert answer.pages_left == 0
    assert len(answers[0].token_ids[0]) == generated + 1
    assert twice.finish_reasons == ["error", "length"]
    assert (twice.token_ids[1], twice.cached_tokens[1]) == (once.token_ids[0], 0)
    assert all_failed.finish_reasons == ["error"] * len(prompts)
