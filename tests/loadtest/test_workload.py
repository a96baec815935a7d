"""Workloads and arrival times: exact, repeatable, and refused where they cannot work."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.arrivals import ClosedLoop, OpenLoop
from leanserve.loadtest.lengths import Lengths
from leanserve.loadtest.prompts import TokenRange
from leanserve.loadtest.trace import read_trace
from leanserve.loadtest.workload import WorkloadOptions, write_workload

CLOSED = ClosedLoop(4)


def draws(text: str, count: int = 4000) -> np.ndarray:
    lengths, rng = Lengths(text), random.Random(3)
    return np.array([lengths.draw(rng, index) for index in range(count)])


def test_lengths_follow_their_written_form():
    assert set(draws("512")) == {512}
    uniform = draws("100-300")
    assert (uniform.min(), uniform.max()) == (100, 300)
    assert uniform.mean() == pytest.approx(200, abs=4)
    assert list(draws("512,2k,1M", 4)) == [512, 2048, 1048576, 512]
    mixed = draws("95% 512, 5% 128k")
    assert set(mixed) == {512, 131072}
    assert np.mean(mixed == 512) == pytest.approx(0.95, abs=0.015)
    lognormal = draws("lognormal:2k:0.8")
    assert np.median(lognormal) == pytest.approx(2048, rel=0.05)
    assert np.log(lognormal).std() == pytest.approx(0.8, rel=0.05)
    assert draws("lognormal:2k:0.8:3000").max() == 3000


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "12x", "300-100", "50%:512", "50%:512,1k", "lognormal:2k", "lognormal:2k:x"]
)
def test_a_wrong_length_is_refused_by_its_text(text):
    with pytest.raises(ConfigError, match="--prompt-tokens"):
        Lengths(text)


@pytest.mark.parametrize(
    ("arrivals", "mean_s", "variance"),
    [
        (OpenLoop(5, "constant"), 0.2, 0),
        (OpenLoop(5, "poisson"), 0.2, 0.04),
        (OpenLoop(5, "gamma", burstiness=4), 0.2, 0.16),
        (OpenLoop(5, "gamma", burstiness=0.25), 0.2, 0.01),
    ],
    ids=lambda value: value.describe() if isinstance(value, OpenLoop) else None,
)
def test_arrivals_have_the_rate_and_the_spread_asked_for(arrivals, mean_s, variance):
    starts = arrivals.starts_s(20_001, seed=1)
    gaps = np.diff(starts)
    assert starts[0] == 0
    assert starts == arrivals.starts_s(20_001, seed=1)
    assert gaps.mean() == pytest.approx(mean_s, rel=0.04)
    assert gaps.var() == pytest.approx(variance, rel=0.1, abs=1e-12)


def test_a_ramp_runs_from_one_rate_to_the_other():
    gaps = np.diff(OpenLoop(2, "ramp", ramp_to_rps=20).starts_s(1001, seed=1))
    assert (np.diff(gaps) < 0).all()
    assert (1 / gaps[0], 1 / gaps[-1]) == (pytest.approx(2, rel=0.01), pytest.approx(20, rel=0.01))


@pytest.mark.parametrize(
    "make",
    [
        lambda: OpenLoop(0),
        lambda: OpenLoop(float("nan")),
        lambda: OpenLoop(1, "gamma", burstiness=0),
        lambda: OpenLoop(1, "ramp"),
        lambda: OpenLoop(1, "poisson", ramp_to_rps=2),
        lambda: ClosedLoop(0),
        lambda: WorkloadOptions(requests=0),
        lambda: WorkloadOptions(cancel_share=1.5),
        lambda: WorkloadOptions(turns=2, needle_share=0.5),
        lambda: TokenRange.parse("5"),
    ],
)
def test_arrivals_and_options_that_cannot_work_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def ids_of(fragment: bytes) -> list[int]:
    return json.loads(b"[" + fragment + b"]")


def test_prompts_are_exact_seeded_and_share_nothing_unless_told():
    options = WorkloadOptions(requests=20, prompt_tokens=Lengths("30-90"), seed=5)
    turns = [conversation.turns[0] for conversation in write_workload(options, CLOSED).conversations]
    prompts = [ids_of(turn.prompt.fragment) for turn in turns]
    assert [len(prompt) for prompt in prompts] == [turn.prompt.tokens for turn in turns]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 20
    assert {1000 <= token <= 1999 for prompt in prompts for token in prompt} == {True}
    again = write_workload(options, OpenLoop(3)).conversations
    assert [conversation.turns[0].prompt for conversation in again] == [turn.prompt for turn in turns]
    # Faults change nothing else.
    faulty = write_workload(WorkloadOptions(**(vars(options) | {"cancel_share": 0.5})), CLOSED).conversations
    assert [c.turns[0].prompt for c in faulty] == [turn.prompt for turn in turns]
    assert [c.turns[0].output_tokens for c in faulty] == [turn.output_tokens for turn in turns]


def test_a_shared_prefix_counts_as_part_of_the_length():
    options = WorkloadOptions(requests=4, prompt_tokens=Lengths("100"), shared_prefix_tokens=60)
    prompts = [ids_of(c.turns[0].prompt.fragment) for c in write_workload(options, CLOSED).conversations]
    assert {len(prompt) for prompt in prompts} == {100}
    assert len({tuple(prompt[:60]) for prompt in prompts}) == 1
    assert len({tuple(prompt[60:70]) for prompt in prompts}) == 4
    with pytest.raises(ConfigError, match="shared-prefix"):
        write_workload(WorkloadOptions(prompt_tokens=Lengths("50"), shared_prefix_tokens=60), CLOSED)


def test_texts_and_needles_have_the_bundled_tokenizers_length():
    from leanserve.bundled.corpus import _bundled_tokenizer

    options = WorkloadOptions(requests=4, prompt_tokens=Lengths("300,700"), prompts="text", needle_share=0.5)
    turns = [conversation.turns[0] for conversation in write_workload(options, CLOSED).conversations]
    assert [turn.needle is not None for turn in turns] == [False, True, False, True]
    for turn in turns:
        text = json.loads(b'"' + turn.prompt.fragment + b'"')
        assert len(_bundled_tokenizer().encode(text).ids) == turn.prompt.tokens
        assert turn.needle is None or (turn.needle in text and text.endswith("Answer:"))
    with pytest.raises(ConfigError, match="20 tokens cannot be written"):
        write_workload(WorkloadOptions(prompt_tokens=Lengths("20"), prompts="text"), CLOSED)


def test_a_workload_that_cannot_fit_is_refused_with_the_numbers():
    options = WorkloadOptions(requests=3, prompt_tokens=Lengths("500,900,700"), output_tokens=Lengths("64"))
    workload = write_workload(options, CLOSED)
    workload.check_fits(964)
    workload.check_fits(None)
    with pytest.raises(ConfigError, match=r"2 of 3 .* 900 prompt \+ 64 output = 964 .* limit is 600; .* at most 536"):
        workload.check_fits(600)
    turns = write_workload(WorkloadOptions(requests=3, turns=3, turn_tokens=Lengths("10")), CLOSED)
    assert turns.conversations[0].longest_tokens == 512 + 2 * 10 + 3 * 64


def test_traces_keep_times_lengths_and_shared_blocks(tmp_path: Path):
    ours = tmp_path / "ours.jsonl"
    ours.write_text(
        '{"timestamp_s": 7.5, "prompt_tokens": 40, "output_tokens": 5}\n\n'
        '{"timestamp_s": 7.0, "prompt_tokens": 9, "output_tokens": 6}\n'
    )
    first, second = read_trace(ours, 1, TokenRange())
    assert (first.start_s, first.turns[0].prompt.tokens, first.turns[0].output_tokens) == (0, 9, 6)
    assert (second.start_s, second.turns[0].index, len(ids_of(second.turns[0].prompt.fragment))) == (0.5, 1, 40)
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text(
        '{"timestamp": 0, "input_length": 1030, "output_length": 5, "hash_ids": [46, 47, 48]}\n'
        '{"timestamp": 250, "input_length": 700, "output_length": 5, "hash_ids": [46, 99]}\n'
    )
    a, b = (ids_of(c.turns[0].prompt.fragment) for c in read_trace(mooncake, 1, TokenRange()))
    assert (len(a), len(b)) == (1030, 700)
    assert a[:512] == b[:512]
    assert a[512:600] != b[512:600]
    for line in ("{}", "[1]", '{"timestamp_s": 1, "prompt_tokens": 0, "output_tokens": 1}', "x"):
        ours.write_text(f'{{"timestamp_s": 0, "prompt_tokens": 1, "output_tokens": 1}}\n{line}\n')
        with pytest.raises(ConfigError, match="line 2"):
            read_trace(ours, 1, TokenRange())
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none", 1, TokenRange())
