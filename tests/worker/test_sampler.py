"""Sampling: what is kept, what is drawn, and that a draw depends on its own seed and index alone."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from leanserve.contracts.sampling import SamplingParams
from leanserve.worker.sampler import Draw, gumbel_noise, sample

V = 50


def draws(count: int, **params) -> list[Draw]:
    return [Draw(SamplingParams(**params), seed=1, index=i) for i in range(count)]


@pytest.fixture
def logits_V() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2


def frequencies(logits_V: torch.Tensor, count: int = 20_000, **params) -> torch.Tensor:
    tokens = sample(logits_V.expand(count, V), draws(count, **params))
    return torch.bincount(tokens, minlength=V) / count


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie():
    logits = torch.zeros(2, V)
    logits[0, [7, 9]] = 1.0
    logits[1, 3] = 1.0
    assert sample(logits, draws(2, temperature=0)).tolist() == [7, 3]


def test_draws_follow_the_softmax(logits_V):
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(logits_V / temperature, -1)
        # Total variation of 20,000 draws over 50 tokens is about sqrt(50 / (2 pi 20000)) = 0.02.
        assert (frequencies(logits_V, temperature=temperature) - expected).abs().sum() / 2 < 0.04


def test_top_k_keeps_exactly_the_k_most_likely(logits_V):
    kept = frequencies(logits_V, top_k=3).nonzero().flatten()
    assert set(kept.tolist()) == set(logits_V.topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits_V):
    probs, order = torch.softmax(logits_V.double(), -1).sort(descending=True)
    needed = int((probs.cumsum(0) < 0.6).sum()) + 1
    kept = frequencies(logits_V, top_p=0.6).nonzero().flatten()
    assert set(kept.tolist()) == set(order[:needed].tolist())


def test_a_tiny_top_p_keeps_the_most_likely(logits_V):
    assert frequencies(logits_V, count=100, top_p=1e-9).nonzero().flatten().tolist() == [int(logits_V.argmax())]


def test_min_p_drops_what_is_unlikely_beside_the_best(logits_V):
    probs = torch.softmax(logits_V, -1)
    allowed = set((probs >= 0.2 * probs.max()).nonzero().flatten().tolist())
    assert set(frequencies(logits_V, min_p=0.2).nonzero().flatten().tolist()) == allowed


def test_rows_do_not_see_each_other(logits_V):
    mixed = [
        Draw(SamplingParams(temperature=0), 5, 0),
        Draw(SamplingParams(top_k=4, temperature=1.3), 6, 9),
        Draw(SamplingParams(top_p=0.7), 7, 2),
        Draw(SamplingParams(min_p=0.1), 8, 3),
        Draw(SamplingParams(), 9, 4),
    ]
    alone = [int(sample(logits_V[None], [draw])[0]) for draw in mixed]
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 7):
        together = sample(logits_V.expand(5, V), [mixed[i] for i in order]).tolist()
        assert together == [alone[i] for i in order]


def test_tokens_that_are_equally_likely_but_for_rounding_do_not_change_places():
    """Else what is drawn would change with the company of a row, which changes how its logits are rounded."""
    generator = torch.Generator().manual_seed(3)
    logits_V = torch.randn(100, generator=generator).repeat_interleave(2)
    noise_2V = 1e-6 * torch.randn(2, 200, generator=generator)
    rows = [Draw(SamplingParams(top_k=150), seed, 0) for seed in range(300)]
    one, other = (sample((logits_V + noise_V).expand(300, -1), rows) for noise_V in noise_2V)
    assert torch.equal(one, other)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.95}], ids=str)
def test_rounding_changes_a_draw_only_where_two_candidates_tie(params):
    """To invert a cumulative distribution would give 9 and 5 other tokens of 2,000 here."""
    generator = torch.Generator().manual_seed(3)
    logits_V = 2 * torch.randn(1000, generator=generator)
    noise_V = 1e-4 * torch.randn(1000, generator=generator)
    one, other = (sample(row_V.expand(2000, -1), draws(2000, **params)) for row_V in (logits_V, logits_V + noise_V))
    assert int((one != other).sum()) <= 2


def test_a_temperature_next_to_zero_takes_the_largest(logits_V):
    for params in ({}, {"top_k": 5, "top_p": 0.9}):
        tokens = sample(logits_V.expand(20, V), draws(20, temperature=5e-324, **params))
        assert tokens.tolist() == [int(logits_V.argmax())] * 20


def test_a_token_that_is_masked_is_never_drawn(logits_V):
    logits_V[::2] = -torch.inf
    for params in ({}, {"top_k": 40}, {"top_p": 0.999}):
        assert (frequencies(logits_V, temperature=2.0, count=2000, **params)[::2] == 0).all()


def test_the_noise_is_gumbel_and_each_rows_own():
    def key(seed: int, index: int) -> int:
        return Draw(SamplingParams(), seed, index).key

    keys = torch.tensor([[key(42, index)] for index in range(200)])
    noise = gumbel_noise(keys, 100)
    uniform = torch.exp(-torch.exp(-noise)).flatten()
    assert 0 < float(uniform.min()) <= float(uniform.max()) < 1
    counts = torch.histc(uniform, 20, 0, 1)
    # chi-square with 19 degrees of freedom: p < 0.001 above 43.8
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 45
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.35  # of 200 rows: 5 standard deviations
    assert float(torch.corrcoef(noise[:100]).fill_diagonal_(0).abs().max()) < 0.5  # of 100 tokens: the same
    assert key(42, 0) == key(42, 0)
    assert len({key(seed, 0) for seed in range(-500, 500)}) == 1000
    assert key(-(2**63), 3) != key(2**63 - 1, 3)


def test_the_noise_is_that_of_splitmix64():
    """Vigna's splitmix64.c with the state 1234567 gives these numbers first."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = [-math.log(-math.log(((number >> 12) + 0.5) / 2**52)) for number in published]
    assert gumbel_noise(torch.tensor([[1234567]]), 4)[0].tolist() == pytest.approx(expected, rel=1e-12)


class _Copies(TorchDispatchMode):
    """Notes every copy between devices: whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.blocking.append(not kwargs.get("non_blocking", False))
        return result


def test_drawing_does_not_wait_for_the_device():
    """Rows of all kinds, on a device without numbers, where to read one is an error."""
    kinds = [{"temperature": 0}, {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}]
    some = [draws(1, **kind)[0] for kind in kinds]
    with _Copies() as copies:
        tokens = sample(torch.empty(len(some), V, device="meta"), some)
    assert tokens.shape == (len(some),)
    assert copies.blocking
    assert not any(copies.blocking)
