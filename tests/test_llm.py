"""The offline API: `from leanserve import LLM, SamplingParams`."""

import subprocess
import sys

import psutil
import pytest

import leanserve
from checkpoints import checkpoint, hf_greedy, random_prompts
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
