"""The offline API: `from leanserve import LLM, SamplingParams`."""

import subprocess
import sys

import psutil
import pytest
import torch

import leanserve
from checkpoints import checkpoint, hf_greedy, hf_logits, random_prompts
from leanserve import LLM, SamplingParams
from leanserve.contracts.errors import ConfigError, EngineError, ModelError, RequestError, RequestTooLongError

SMALL = {"device": "cpu", "page_tokens": 16, "kv_memory": "8MiB"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return checkpoint(tmp_path_factory, "qwen3")


@pytest.fixture(scope="module")
def llm(model_dir):
    with LLM(model_dir, ranks=2, dtype="float32", weights="all", **SMALL) as llm:
        yield llm


def test_generate_equals_transformers(llm, model_dir):
    prompts = random_prompts([5, 40, 333], seed=21)
    results = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    )
    assert [r.prompt_token_ids for r in results] == prompts
    assert [r.outputs[0].token_ids for r in results] == hf_greedy(model_dir, prompts, 6)
    assert {r.outputs[0].finish_reason for r in results} == {"length"}
    assert [r.outputs[0].text for r in results] == ["", "", ""]


def test_the_engine_says_which_weights_are_split(llm):
    assert llm.info.weights.startswith("all matrices split over the ranks, 0.00 of 0.00 GiB on each")


def test_one_prompt_and_params_per_prompt(llm):
    ids = {"prompt_token_ids": [1, 2, 3]}
    assert len(llm.generate(ids)[0].outputs[0].token_ids) == 16
    results = llm.generate([ids, ids], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [len(r.outputs[0].token_ids) for r in results] == [1, 2]
    with pytest.raises(RequestError, match="1 sampling params for 2 prompts"):
        llm.generate([ids, ids], [SamplingParams()])


def test_a_stop_token_ends_a_completion(llm):
    ids = {"prompt_token_ids": [7, 8, 9]}
    greedy = llm.generate(ids, SamplingParams(temperature=0, max_tokens=5))[0].outputs[0].token_ids
    stopped = llm.generate(ids, SamplingParams(temperature=0, max_tokens=5, stop_token_ids=[greedy[2]]))[0].outputs[0]
    assert stopped.token_ids == greedy[: greedy.index(greedy[2]) + 1]
    assert stopped.finish_reason == "stop"


def test_samples_and_log_probabilities(llm, model_dir):
    prompt = {"prompt_token_ids": random_prompts([20], seed=3)[0]}
    sampling = SamplingParams(n=2, seed=5, max_tokens=3, logprobs=2, prompt_logprobs=0, truncate_prompt_tokens=9)
    [result] = llm.generate(prompt, sampling)
    assert result.prompt_token_ids == prompt["prompt_token_ids"][-9:]
    assert result.prompt_logprobs[0] is None
    for index, output in enumerate(result.outputs):
        alone = llm.generate(
            {"prompt_token_ids": result.prompt_token_ids}, SamplingParams(seed=5 + index, max_tokens=3)
        )[0].outputs[0]
        assert (output.index, output.token_ids, alone.logprobs) == (index, alone.token_ids, None)
        token_ids = result.prompt_token_ids + output.token_ids
        truth_NV = torch.log_softmax(hf_logits(model_dir, token_ids), dim=-1)
        for place, entries in enumerate(result.prompt_logprobs[1:] + output.logprobs):
            assert next(iter(entries)) == token_ids[place + 1]
            assert len(entries) == 1 if place < 8 else 2 <= len(entries) <= 3
            for token_id, entry in entries.items():
                assert entry.logprob == pytest.approx(float(truth_NV[place, token_id]), abs=5e-5)
                assert entry.rank == 1 + int((truth_NV[place] > truth_NV[place, token_id]).sum())
                assert entry.decoded_token is None
    with pytest.raises(RequestError, match="a stream is one completion"):
        next(llm.stream(prompt, sampling))


def test_a_stream_left_early_frees_its_pages(llm):
    stream = llm.stream({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=3000, ignore_eos=True))
    next(stream)
    stream.close()
    llm.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=2))
    assert sum(llm.load.pages_used_per_rank) == 0


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "message"),
    [
        ("text", SamplingParams(), RequestError, "prompt_token_ids"),
        ({"prompt_token_ids": []}, SamplingParams(), RequestError, "empty"),
        ({"prompt_token_ids": [0, 10**6]}, SamplingParams(), RequestError, "1000000"),
        ({"prompt_token_ids": [1], "more": 2}, SamplingParams(), RequestError, "a prompt is a string or"),
        ({"prompt_token_ids": [1]}, SamplingParams(max_tokens=10**6), RequestTooLongError, "above the limit of 4096"),
        ({"prompt_token_ids": [1]}, SamplingParams(stop="x"), RequestError, "needs a tokenizer"),
        ({"prompt_token_ids": [1]}, SamplingParams(logit_bias={10**6: 1}), RequestError, "1000000"),
        ({"prompt_token_ids": [1]}, SamplingParams(stop_token_ids=[10**6]), RequestError, "1000000"),
        (
            {"prompt_token_ids": [1]},
            SamplingParams(structured_outputs={"json_object": True}),
            RequestError,
            "needs a tokenizer",
        ),
    ],
)
def test_a_wrong_request_says_why_and_disturbs_nothing(llm, prompt, sampling, error, message):
    with pytest.raises(error, match=message):
        llm.generate([{"prompt_token_ids": [1]}, prompt], sampling)
    assert llm.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=1))[0].outputs[0].token_ids


def test_options_that_cannot_work(model_dir):
    with pytest.raises(TypeError, match="no option rank; options are"):
        LLM(model_dir, rank=2)
    with pytest.raises(ConfigError, match="allowed are 16"):
        LLM(model_dir, page_tokens=3)
    with pytest.raises(ModelError):
        LLM("/nowhere/at-all")
    with pytest.raises(EngineError, match="holds no page"):
        LLM(model_dir, ranks=1, device="cpu", kv_memory=1)


def test_closing_ends_every_process(model_dir):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    llm = LLM(model_dir, ranks=2, **SMALL)
    assert {p.pid for p in psutil.Process().children(recursive=True)} - before
    llm.close()
    llm.close()
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
    with pytest.raises(EngineError, match="closed"):
        llm.generate({"prompt_token_ids": [1]})


def test_importing_the_package_is_cheap_and_its_names_are_public():
    code = (
        "import sys, leanserve; assert 'torch' not in sys.modules; leanserve.SamplingParams; leanserve.LLM; "
        "assert 'torch' not in sys.modules, 'LLM needs no torch in this process'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(leanserve.__all__) == {"LLM", "SamplingParams", "__version__"}
    with pytest.raises(AttributeError, match="public names"):
        _ = leanserve.nothing
