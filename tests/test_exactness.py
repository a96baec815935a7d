"""The gate: greedy tokens equal to transformers' for every rank count, family, length, batch and page pool."""

from dataclasses import dataclass, replace
from itertools import cycle

import pytest
import torch

from checkpoints import VOCAB_SIZE, checkpoint, hf_greedy, hf_logits, random_prompts
from leanserve.contracts.sampling import SamplingParams
from leanserve.worker.sampler import Draw, sample
from pairwise import pairwise_cases
from rank_group import Answer, Case, run_cases
from triton_interpreter import needs_interpreter

PAGE = 16
LENGTHS_ALONE = [1, PAGE - 1, PAGE, PAGE + 1, 700]
LENGTHS_TOGETHER = [1, PAGE - 1, PAGE, PAGE + 1, 700, 2, 33, 64, 65, 100, 129, 7, 250, 31, 48, 5]
NEW_TOKENS = 6
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)

# Head counts that no rank count divides. One has a layer between the first and the last; two show whatever else can.
SHAPES = {
    "llama": {"heads": 6, "kv_heads": 2, "head_dim": 16, "layers": 3},
    "mistral": {"heads": 5, "kv_heads": 5, "head_dim": 24, "window": 9, "hidden": 60, "layers": 2},
    "qwen2": {"heads": 14, "kv_heads": 2, "head_dim": 8, "hidden": 56, "layers": 2},
    "qwen3": {"heads": 9, "kv_heads": 3, "head_dim": 16, "hidden": 63, "layers": 2, "seed": 2},
    "smollm3": {"heads": 6, "kv_heads": 2, "head_dim": 32, "tied": True, "layers": 2},
}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    return {family: checkpoint(tmp_path_factory, family, **shape) for family, shape in SHAPES.items()}


# Any two of these meet in one case: how a prompt is cut, on how many ranks, and what is in the cache or is taken away.
CHUNKS = pairwise_cases(
    {"ranks": [1, 2, 3, 4], "chunk": [1, 7, 16, 64, 4096], "pool": ["no cache", "cache", "too small"]}
)


def chunked_case(model_dir, *, ranks: int, chunk: int, pool: str) -> Case:
    """Three prompts that begin alike and one that does not. Too small: some have to take turns."""
    head, *tails = random_prompts([20, 9, 14, 1, 30], seed=14)
    too_small = pool == "too small"
    return Case(
        model_dir,
        [head + tails[0], head + tails[1], tails[3], head + tails[2]],
        SamplingParams(temperature=0, max_tokens=20 if too_small else NEW_TOKENS),
        page_tokens=PAGE,
        pages_per_rank=-(-5 // ranks) if too_small else 400,
        max_batch_tokens=chunk,
        prefix_cache=pool != "no cache",
    )


def cases_of(model_dirs) -> list[tuple[str, Case]]:
    cases = []
    for family, model_dir in model_dirs.items():
        alone = random_prompts(LENGTHS_ALONE, seed=1)
        together = random_prompts(LENGTHS_TOGETHER, seed=2)
        cases += [
            (f"{family} alone", Case(model_dir, alone, GREEDY, at_once=False, page_tokens=PAGE)),
            (f"{family} together", Case(model_dir, together, GREEDY, page_tokens=PAGE)),
        ]
    return cases


def tight_pool(model_dirs, num_ranks: int) -> Case:
    """A pool that holds the longest prompt and little more: the others must give way and be computed again."""
    return Case(
        model_dirs["qwen3"],
        random_prompts([60, 200, 90, 130, 100, 60, 40, 15], seed=3),
        SamplingParams(temperature=0, max_tokens=40),
        page_tokens=PAGE,
        pages_per_rank=-(-20 // num_ranks),
    )


CHUNK_PAGES = 7


def counted_prefill(model_dirs) -> Case:
    """A prompt of three chunks, the last one not quite full."""
    prompts = random_prompts([3 * CHUNK_PAGES * PAGE - 5], seed=16)
    chunk = CHUNK_PAGES * PAGE
    return Case(model_dirs["llama"], prompts, GREEDY, page_tokens=PAGE, max_batch_tokens=chunk, counts_traffic=True)


def long_steps(model_dirs) -> Case:
    """Chunks that grow until somebody streams, and again after that."""
    prompts = random_prompts([150, 260, 33, 5], seed=17)
    return Case(model_dirs["llama"], prompts, GREEDY, page_tokens=PAGE, max_batch_tokens=9, max_prefill_step_tokens=70)


def four_samples(model_dirs) -> Case:
    prompts = random_prompts([3 * PAGE + 9], seed=15) * 4
    sampling = SamplingParams(temperature=0.9, top_k=30, max_tokens=8)
    return Case(model_dirs["qwen2"], prompts, sampling, seeds=(11, -3, 2**62, 0), page_tokens=PAGE)


@dataclass(frozen=True)
class Group:
    """What a group of ranks made of all cases: to start one takes longer than to serve them."""

    num_ranks: int
    greedy: list[tuple[str, Case, Answer]]
    tight_pool: Answer
    counted: tuple[Case, Answer]
    samples: tuple[Case, Answer]


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{}-ranks".format)
def group(request, model_dirs) -> Group:
    num_ranks = request.param
    cases = cases_of(model_dirs)
    cases += [(f"{cut}", chunked_case(model_dirs["qwen2"], **cut)) for cut in CHUNKS if cut["ranks"] == num_ranks]
    if num_ranks == 3:
        cases += [(f"{name}, overlapped", replace(case, overlap=True)) for name, case in cases if "qwen3" in name]
        cases.append(("tight pool, overlapped", replace(tight_pool(model_dirs, num_ranks), overlap=True)))
    cases.append(("long steps", long_steps(model_dirs)))
    cases.append(("tight pool", tight_pool(model_dirs, num_ranks)))
    cases.append(("counted", counted_prefill(model_dirs)))
    samples = four_samples(model_dirs)
    *answers, sampled = run_cases(num_ranks, [*(case for _, case in cases), samples])
    greedy = [(name, case, answer) for (name, case), answer in zip(cases, answers, strict=True)]
    return Group(num_ranks, greedy, answers[-2], greedy[-1][1:], (samples, sampled))


def test_greedy_tokens_equal_transformers(group):
    for name, case, answer in group.greedy:
        assert answer.token_ids == hf_greedy(case.model_dir, case.prompts, case.sampling.max_tokens), name
        assert answer.finish_reasons == ["length"] * len(case.prompts), name
        assert answer.pages_left == 0, name
        assert (answer.num_ahead > 0) == case.overlap, name
        longest = max(report.decode_rows + report.prefill_tokens for report in answer.step_reports)
        assert longest <= (case.max_prefill_step_tokens or case.max_batch_tokens), name
        assert longest > case.max_batch_tokens or case.max_prefill_step_tokens is None, name
    assert group.tight_pool.preemptions > 0


def test_time_in_collectives_is_told_for_each_step_that_computes(group):
    for _, _, answer in group.greedy:
        for report in answer.step_reports:
            computed = bool(report.decode_rows or report.prefill_tokens)
            assert (report.times.combine_s > 0) == (computed and group.num_ranks > 1)
            assert report.times.combine_s <= report.times.forward_s + report.times.sample_s


def test_each_rank_computes_its_share_and_no_key_or_value_travels(group):
    """Counted in every step: whose hidden states a rank computes, and each byte that it sends while it attends."""
    case, answer = group.counted
    heads, head_dim, chunk = 6, 16, CHUNK_PAGES * PAGE
    bytes_of_numbers = 4 * 3 if group.num_ranks > 1 else 0  # float32, in each of three layers
    chunks = [chunk, chunk, chunk - 5]
    for step, tokens in enumerate(chunks):
        per_rank = [steps[step].tokens for steps in answer.traffic]
        assert sum(per_rank) == tokens
        assert max(per_rank) <= -(-CHUNK_PAGES // group.num_ranks) * PAGE, "a rank's share, to within a page"
        # Queries of the longest share to everybody, and a state for each query of the chunk to its owner.
        queries, states = max(per_rank) * heads * head_dim, tokens * heads * (head_dim + 1)
        assert {steps[step].bytes_sent for steps in answer.traffic} == {bytes_of_numbers * (queries + states)}
    for steps in answer.traffic:
        decode = steps[len(chunks) :]
        assert len(decode) == case.sampling.max_tokens - 1
        assert {step.tokens for step in decode} == {1}
        assert {step.bytes_sent for step in decode} == {bytes_of_numbers * heads * (head_dim + 1)}


def test_four_samples_of_one_prompt_are_those_of_transformers_logits(group):
    """Three follow the first and copy its last page. Each token is what its seed draws from the peer's logits."""
    case, answer = group.samples
    prompt = case.prompts[0]
    assert answer.cached_tokens == [0] + [len(prompt) - 1] * 3
    assert len({tuple(token_ids) for token_ids in answer.token_ids}) == 4
    for seed, token_ids in zip(case.seeds, answer.token_ids, strict=True):
        logits = hf_logits(case.model_dir, [*prompt, *token_ids])[len(prompt) - 1 : -1]
        draws = [Draw(case.sampling, seed, index) for index in range(len(token_ids))]
        assert sample(logits, draws).tolist() == token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_greedy_tokens_on_ranks_that_share_a_gpu_equal_transformers(model_dirs, num_ranks):
    """Triton's kernels; one rank replays CUDA graphs, several go through Gloo and launch every step anew."""
    cases = [(name, replace(case, device="cuda")) for name, case in cases_of(model_dirs)]
    for (name, case), answer in zip(cases, run_cases(num_ranks, [case for _, case in cases]), strict=True):
        assert answer.token_ids == hf_greedy(case.model_dir, case.prompts, case.sampling.max_tokens), name
        assert answer.pages_left == 0, name


def chats(model_dir, *, system_tokens: int, turns: int) -> list[list[int]]:
    """The prompts of two conversations in turn behind one system prompt: each holds all that was said before."""
    system, *sayings = random_prompts([system_tokens] + [11, 29] * turns, seed=8)
    said = [system, system]
    prompts = []
    for number, saying in enumerate(sayings):
        said[number % 2] = said[number % 2] + saying
        prompts.append(said[number % 2])
        (answer,) = hf_greedy(model_dir, [said[number % 2]], NEW_TOKENS)
        said[number % 2] = said[number % 2] + answer
    return prompts


def found(known_tokens: int) -> int:
    """Of tokens that are cached: whole pages, and some of the page after them, if that is worth a copy."""
    rest = known_tokens % PAGE
    return known_tokens - (rest if rest < PAGE / 4 else 0)


def cached_cases_of(model_dirs) -> dict[str, tuple[Case, list[int]]]:
    """Cases with what each prompt must find in the cache."""
    prompts = chats(model_dirs["qwen3"], system_tokens=50, turns=10)
    # The first to speak finds nothing, the second the system prompt, both later all but the newest token of their past.
    known = [0, 50] + [len(prompt) + NEW_TOKENS - 1 for prompt in prompts[:-2]]
    chat = Case(model_dirs["qwen3"], prompts, GREEDY, at_once=False, page_tokens=PAGE)
    one, other = random_prompts([4 * PAGE, 100], seed=9)
    repeated = Case(model_dirs["llama"], [one, other, one, other, one[:40]], GREEDY, at_once=False, page_tokens=PAGE)
    window = Case(model_dirs["mistral"], [other, other[:90], other], GREEDY, at_once=False, page_tokens=PAGE)
    return {
        "two conversations": (chat, [found(tokens) for tokens in known]),
        # The last token is computed again, for the next one is sampled from it.
        "repeated": (repeated, [0, 0, 4 * PAGE - 1, found(99), found(39)]),
        "repeated, a window": (window, [0, found(89), found(99)]),
        "switched off": (replace(repeated, prefix_cache=False), [0] * 5),
    }


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_greedy_tokens_with_a_prefix_cache_equal_transformers(model_dirs, num_ranks):
    cases = cached_cases_of(model_dirs)
    # Three long texts in turn on pages for little more than one: what one needs, another loses.
    texts = random_prompts([150, 170, 160], seed=10)
    evicting = Case(
        model_dirs["smollm3"],
        [texts[i] for i in (0, 0, 1, 0, 2, 1, 1, 2, 0)],
        GREEDY,
        at_once=False,
        page_tokens=PAGE,
        pages_per_rank=-(-18 // num_ranks),
    )
    # All at once, on a pool that some must leave again: who comes back finds its own pages and those of others.
    head = random_prompts([70], seed=11)[0]
    crowded = Case(
        model_dirs["qwen2"],
        [head + tail for tail in random_prompts([9, 40, 1, 25, 60, 33, 17, 5], seed=12)],
        SamplingParams(temperature=0, max_tokens=40),
        page_tokens=PAGE,
        pages_per_rank=-(-21 // num_ranks),
    )
    answers = run_cases(num_ranks, [case for case, _ in cases.values()] + [evicting, crowded])
    for (name, (case, cached_tokens)), answer in zip(cases.items(), answers, strict=False):
        assert answer.token_ids == hf_greedy(case.model_dir, case.prompts, NEW_TOKENS), name
        assert answer.cached_tokens == cached_tokens, name
        assert answer.pages_left == 0, name
    for case, answer in ((evicting, answers[-2]), (crowded, answers[-1])):
        assert answer.token_ids == hf_greedy(case.model_dir, case.prompts, case.sampling.max_tokens)
        assert sum(answer.cached_tokens) > 0
        assert answer.pages_left == 0
    assert answers[-2].cached_tokens[1] == 149, "at once again: all of it"
    assert answers[-2].cached_tokens[-1] < 9 * PAGE, "after two others: some of it was forgotten"
    assert answers[-1].preemptions > 0


def test_rope_that_depends_on_the_prompts_length_is_served_without_the_cache(tmp_path_factory):
    """A page of a short prompt is rotated otherwise than the same tokens in a long one."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.5, 1.7, 2.0, 2.2],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
    }
    model_dir = checkpoint(tmp_path_factory, "llama", rope=rope)
    (text,) = random_prompts([100], seed=13)
    case = Case(model_dir, [text[:50], text, text], GREEDY, at_once=False, page_tokens=PAGE)
    (answer,) = run_cases(1, [case])
    assert answer.token_ids == hf_greedy(model_dir, case.prompts, NEW_TOKENS)
    assert answer.cached_tokens == [0, 0, 0]


def test_a_window_of_9_is_neither_8_nor_10(tmp_path_factory):
    prompts = random_prompts([40, 57, 64, 71, 33, 90], seed=4)
    expected = {
        window: hf_greedy(checkpoint(tmp_path_factory, "mistral", window=window), prompts, NEW_TOKENS)
        for window in (8, 9, 10)
    }
    assert expected[9] not in (expected[8], expected[10])
    case = Case(checkpoint(tmp_path_factory, "mistral", window=9), prompts, GREEDY, page_tokens=PAGE)
    assert run_cases(1, [case])[0].token_ids == expected[9]
    assert run_cases(3, [case])[0].token_ids == expected[9]


def test_one_broken_page_changes_the_answer(model_dirs):
    """The gate can fail: zeros in a single page of one rank give other tokens."""
    prompts = random_prompts([100], seed=5)
    whole = Case(model_dirs["llama"], prompts, GREEDY, page_tokens=PAGE)
    broken = Case(model_dirs["llama"], prompts, GREEDY, page_tokens=PAGE, broken_page=(1, 1))
    answers = run_cases(3, [whole, broken])
    expected = hf_greedy(model_dirs["llama"], prompts, NEW_TOKENS)
    assert answers[0].token_ids == expected
    assert answers[1].token_ids != expected


def split_cases_of(model_dirs, num_ranks) -> list[Case]:
    """MLP and vocabulary split, or all matrices, in turn: chunks of at most 64 tokens beside decode rows."""
    families = {2: ["llama", "mistral", "qwen2"], 4: ["qwen2", "qwen3", "smollm3"]}.get(num_ranks, list(model_dirs))
    prompts = random_prompts([1, 33, 130, 7], seed=14)
    return [
        Case(model_dirs[family], prompts, GREEDY, page_tokens=PAGE, max_batch_tokens=64, weights=weights)
        for family, weights in zip(families, cycle(["mlp", "all"]), strict=False)
    ]


def awkward_split_cases_of(model_dirs) -> list[Case]:
    """For 3 ranks: 5 and 5, 14 and 2 heads; small chunks, a prefix cache that hits, a pool that some must leave."""
    head, one = random_prompts([40, 21], seed=15)
    tails = random_prompts([9, 33, 1, 25, 17], seed=16)
    crowded = Case(
        model_dirs["qwen2"],
        [head + tail for tail in tails],
        SamplingParams(temperature=0, max_tokens=40),
        page_tokens=PAGE,
        pages_per_rank=4,
        weights="mlp",
    )
    return [
        crowded,
        replace(crowded, weights="all"),
        Case(model_dirs["mistral"], [one, head], GREEDY, page_tokens=PAGE, max_batch_tokens=7, weights="mlp"),
        Case(model_dirs["mistral"], [one, head], GREEDY, page_tokens=PAGE, max_batch_tokens=7, weights="all"),
        Case(model_dirs["llama"], [one], GREEDY, page_tokens=PAGE, max_batch_tokens=1, weights="all"),
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_greedy_tokens_with_split_weights_equal_transformers(tmp_path_factory, model_dirs, num_ranks):
    cases = split_cases_of(model_dirs, num_ranks)
    if num_ranks == 3:
        cases += awkward_split_cases_of(model_dirs)
    if num_ranks == 4:
        # Fewer columns than ranks: some hold nothing of the MLP, or of what attention gives.
        narrow = {"heads": 1, "kv_heads": 1, "head_dim": 2, "hidden": 8, "intermediate_size": 3, "vocab_size": 101}
        model_dir = checkpoint(tmp_path_factory, "qwen2", tied=True, **narrow)
        prompts = random_prompts([5, 40], seed=17, vocab_size=101)
        cases.append(Case(model_dir, prompts, GREEDY, page_tokens=PAGE, weights="all"))
    answers = run_cases(num_ranks, cases)
    for case, answer in zip(cases, answers, strict=True):
        expected = hf_greedy(case.model_dir, case.prompts, case.sampling.max_tokens)
        assert answer.token_ids == expected, f"{case.model_dir.name} {case.weights}"
        assert answer.pages_left == 0
    if num_ranks == 3:
        for crowded in answers[5:7]:
            assert crowded.preemptions > 0
            assert sum(crowded.cached_tokens) > 0


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_logits_equal_transformers(tmp_path_factory, model_dirs, num_ranks):
    biased = checkpoint(tmp_path_factory, "llama", attention_bias=True, mlp_bias=True, layers=2)
    (prompt,) = random_prompts([150], seed=6)
    one_token = SamplingParams(temperature=0, max_tokens=1)
    cases = [
        Case(
            model_dir,
            [prompt],
            one_token,
            page_tokens=PAGE,
            max_batch_tokens=64,
            weights=weights,
            keep_logits=True,
        )
        for model_dir in [*model_dirs.values(), biased]
        for weights in (["replicated"] if num_ranks == 1 else ["replicated", "mlp", "all"])
    ]
    for case, answer in zip(cases, run_cases(num_ranks, cases), strict=True):
        expected = hf_logits(case.model_dir, case.prompts[0])[-1]
        error = (torch.tensor(answer.rows_logits[-1][0]) - expected).abs().max() / expected.abs().max()
        assert error < 2e-5, f"{case.model_dir.name}, {case.weights}: {error:.2e} of the logits' scale"


def test_seeded_samples_do_not_depend_on_company_or_ranks(model_dirs):
    prompts = random_prompts([20, 33, 47, 12], seed=7)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, top_k=40, seed=1234, max_tokens=12)

    def answer(num_ranks: int, at_once: bool, pages_per_rank: int = 400) -> Answer:
        case = Case(
            model_dirs["llama"], prompts, sampling, at_once=at_once, page_tokens=PAGE, pages_per_rank=pages_per_rank
        )
        return run_cases(num_ranks, [case])[0]

    alone = answer(1, at_once=False)
    crowd, crowd_on_3, preempted = answer(1, True), answer(3, True), answer(1, True, pages_per_rank=8)
    assert preempted.preemptions > 0
    assert alone.token_ids == crowd.token_ids == crowd_on_3.token_ids == preempted.token_ids
    assert len({tuple(ids) for ids in alone.token_ids}) == len(prompts)
    assert all(0 <= t < VOCAB_SIZE for ids in alone.token_ids for t in ids)
    assert torch.tensor(alone.token_ids).unique().numel() > 5


@needs_interpreter
def test_the_triton_kernels_serve_a_model_in_the_interpreter(tmp_path_factory, monkeypatch):
    """What CUDA runs, end to end on two ranks with whole weights and split ones: the attention's operators, and the
    fused ones between a layer's products."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the rank processes, which have not imported Triton yet
    model_dir = checkpoint(tmp_path_factory, "mistral", layers=2, window=20)
    prompts = random_prompts([1, PAGE + 9], seed=8)
    sampling = SamplingParams(temperature=0, max_tokens=3)
    cases = [
        Case(model_dir, prompts, sampling, page_tokens=PAGE, attention="triton", weights=weights)
        for weights in ("replicated", "all")
    ]
    expected = hf_greedy(model_dir, prompts, 3)
    assert [answer.token_ids for answer in run_cases(2, cases)] == [expected, expected]
