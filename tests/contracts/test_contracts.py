"""Data that rooms exchange: checked once, and the same after a trip over the wire."""

import math
import socket
from array import array

import pytest

from leanserve.contracts import errors
from leanserve.contracts.batch import Batch, NewSequence, Row, step_checksum
from leanserve.contracts.config import BatchOptions, CacheOptions, EngineConfig
from leanserve.contracts.errors import ConfigError, RequestError
from leanserve.contracts.kv_sharding import KvSharding, PageGrant
from leanserve.contracts.logprobs import Logprobs
from leanserve.contracts.machine import this_machine
from leanserve.contracts.messages import Configure, Submit, decode_to_engine, encode
from leanserve.contracts.sampling import SamplingParams
from leanserve.contracts.token_counts import parse_tokens


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_k": -2},
        {"top_k": 2**31},
        {"min_p": -0.5},
        {"min_p": math.inf},
        {"seed": 2**63},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [2**31]},
        {"priority": True},
        {"priority": 1_000_001},
        {"priority": 0.5},
        {"cache_salt": ""},
        {"n": 0},
        {"n": 129},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"presence_penalty": 2.01},
        {"frequency_penalty": -2.01},
        {"frequency_penalty": math.nan},
        {"repetition_penalty": 0},
        {"repetition_penalty": 101},
        {"logit_bias": {5: 100.5}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {5: True}},
        {"logit_bias": {"5": 1}},
        {"logit_bias": dict.fromkeys(range(1025), 1)},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [-1]},
        {"allowed_token_ids": range(4097)},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": True},
        {"prompt_logprobs": 21},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": 2**31},
        {"structured_outputs": 5},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
        {"structured_outputs": {"json_object": 1}},
        {"structured_outputs": {"regex": "a", "json_object": True}},
        {"structured_outputs": {"regex": ""}},
        {"structured_outputs": {"regex": 5}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": ["a", ""]}},
        {"structured_outputs": {"choice": ["a"] * 1025}},
        {"structured_outputs": {"json": {"type": "object", "x": math.inf}}},
        {"structured_outputs": {"grammar": "x" * (128 * 1024 + 1)}},
        {"structured_outputs": {"frob": "a"}},
        {"cache_salt": "x" * 257},
        {"cache_salt": 7},
    ],
    ids=lambda wrong: str(wrong)[:30],
)
def test_a_wrong_sampling_value_names_its_field(wrong):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**wrong)
    (field,) = wrong
    assert caught.value.param == field
    assert field in str(caught.value)


def test_common_spellings():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop == ("x", "y")
    assert SamplingParams(top_k=-1).top_k is None
    assert SamplingParams(top_k=0).top_k is None


def test_samples_are_requests_of_their_own():
    one = SamplingParams(seed=7, top_k=3)
    assert one.samples() == [one]
    assert SamplingParams(n=3, seed=7, top_k=3).samples() == [SamplingParams(seed=7 + i, top_k=3) for i in range(3)]
    assert [s.seed for s in SamplingParams(n=2, seed=2**63 - 1).samples()] == [2**63 - 1, -(2**63)]
    assert [s.seed for s in SamplingParams(n=2).samples()] == [None, None]


def test_log_probabilities_by_token():
    def floats(*values: float) -> bytes:
        return array("f", values).tobytes()

    def ints(*values: int) -> bytes:
        return array("i", values).tobytes()

    one = Logprobs(2, floats(-0.5), ints(1), ints(4, 9), floats(-0.5, -1.0))
    two = Logprobs(2, floats(-2.0, -3.0), ints(3, 7), ints(1, 2, 3, 4), floats(-0.25, -1.5, -0.125, -4.0))
    both = Logprobs.join([one, two])
    assert len(both) == 3
    assert both.rows() == [
        (-0.5, 1, [(4, -0.5), (9, -1.0)]),
        (-2.0, 3, [(1, -0.25), (2, -1.5)]),
        (-3.0, 7, [(3, -0.125), (4, -4.0)]),
    ]
    assert both.row(1).rows() == both.rows()[1:2]
    assert Logprobs(0, floats(-1.0), ints(5), b"", b"").rows() == [(-1.0, 5, [])]


def test_messages_survive_the_wire():
    config = EngineConfig(model_dir="m", cache=CacheOptions(page_tokens=16, kv_memory_bytes=9), batch=BatchOptions())
    wish = {"json": {"type": "object"}}
    sampling = SamplingParams(temperature=0, stop=("a",), seed=-5, logit_bias={7: -1.5}, structured_outputs=wish)
    submit = Submit("r", b"\1\0\0\0", sampling)
    for message in (Configure(config, 7, "tcp://127.0.0.1:1"), submit):
        assert decode_to_engine(encode(message)) == message


def test_a_step_message_is_small_however_long_the_context():
    def size(context_tokens: int) -> int:
        rows = [Row(i, context_tokens, 1, True) for i in range(256)]
        return len(encode(Batch(5, [], [], [PageGrant(1, context_tokens // 64, 0, 3)], [], rows, 4, 99)))

    assert size(1_000_000) - size(100) <= 256 * 5  # only the width of a number grows


def test_a_new_sequence_carries_its_tokens_as_bytes():
    new = NewSequence(1, bytes(4 * 1_000_000), 1_000_000, SamplingParams(), 0)
    assert len(encode(new)) < 4 * 1_000_000 + 100


def test_the_checksum_depends_on_step_tokens_and_order():
    values = {step_checksum(*args) for args in [(1, [2, 3]), (1, [3, 2]), (2, [2, 3]), (1, [2]), (1, [])]}
    assert len(values) == 5


def test_token_counts_have_binary_units():
    texts = ("7", "131072", "16k", " 1.5 K", "1M", "9" * 400)
    assert [parse_tokens(text) for text in texts] == [7, 131_072, 16_384, 1536, 1 << 20, int("9" * 400)]


@pytest.mark.parametrize("text", ["0", "0.0001k", "-1", "1G", "many", "", "1e3"])
def test_wrong_token_counts_are_refused_by_their_option(text: str):
    with pytest.raises(ConfigError, match=r"--context: .* is not a positive number of tokens"):
        parse_tokens(text, "--context")


def test_sharding_counts_pages():
    sharding = KvSharding(page_tokens=16, pages_per_rank=(3, 5))
    assert (sharding.num_ranks, sharding.total_tokens) == (2, 128)
    assert [sharding.pages_for(t) for t in (0, 1, 16, 17)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    "wrong", [{"dtype": "int8"}, {"device": "tpu"}, {"comm": "mpi"}, {"attention": "fast"}, {"weights": "half"}]
)
def test_a_wrong_choice_lists_the_right_ones(wrong):
    with pytest.raises(ConfigError, match="allowed are auto"):
        EngineConfig(model_dir="m", **wrong)


def test_the_errors_are_those_of_the_drawing():
    for name in errors.__all__:
        assert name in (errors.__doc__ or ""), f"{name} is missing from the tree in the docstring"


def test_machines_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    name = this_machine()
    assert name == this_machine()
    assert name.startswith(f"{socket.gethostname()}/")
    monkeypatch.setattr("leanserve.contracts.machine.os.readlink", lambda path: "pid:[of another container]")
    assert this_machine() != name
    assert this_machine().startswith(f"{socket.gethostname()}/")
