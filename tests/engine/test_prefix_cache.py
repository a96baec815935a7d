"""Pages used again: by whom, when not, which are forgotten, and what it costs. `CheckedRun` checks every answer."""

import time

import pytest

from engine.fake_executors import EchoExecutor
from engine.test_host_cost import calls_in
from engine.workload import CheckedRun, token_bytes, toy_submit
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Submit, encode
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine
from leanserve.engine.pages import PageAllocator, SequencePages
from leanserve.engine.prefix_cache import PageNamer
from leanserve.engine.scheduler import Scheduler

T = 4


def run_with(*pages_per_rank: int, budget: int = 64, prefix_cache: bool = True) -> CheckedRun:
    sharding = KvSharding(page_tokens=T, pages_per_rank=pages_per_rank)
    return CheckedRun(sharding, BatchOptions(max_batch_tokens=budget), prefix_cache=prefix_cache)


def again(number: int, first: Submit, extra_tokens: int = 0, **sampling) -> Submit:
    return toy_submit(number, extra_tokens, 3, behind=first.prompt_token_ids, ignore_eos=True, **sampling)


@pytest.mark.parametrize(
    ("prompt_tokens", "extra_tokens", "cached_tokens"),
    [(1, 9, 1), (3, 9, 3), (4, 0, 3), (4, 1, 4), (8, 0, 7), (9, 0, 8), (11, 0, 10), (11, 1, 11), (40, 7, 40)],
)
def test_everything_known_is_used_again_but_never_the_last_token(
    prompt_tokens: int, extra_tokens: int, cached_tokens: int
) -> None:
    """The next token is sampled from the last one's hidden state, so that one is computed in any case."""
    run = run_with(20, 20, 20)
    first = toy_submit(1, prompt_tokens, 1)
    assert run.serve(first) == 0
    computed = run.executor.computed_tokens
    assert run.serve(again(2, first, extra_tokens)) == cached_tokens
    assert run.executor.computed_tokens - computed == prompt_tokens + extra_tokens - cached_tokens + 2
    run.finish(max_steps=9)


def test_a_chat_computes_only_what_is_new_in_each_turn() -> None:
    """Two conversations in turn behind one system prompt; generated tokens are used again as prompts are."""
    run = run_with(100, 100)
    system = toy_submit(0, 50, 1).prompt_token_ids
    texts = [system, system]
    for turn in range(10):
        for speaker in range(2):
            number = 1 + 2 * turn + speaker
            request = toy_submit(number, 7, 9, behind=texts[speaker], ignore_eos=True)
            cached = run.serve(request)
            # Of the turn before: its text but the newest token, whose key was never needed; at first the system prompt.
            known_tokens = len(texts[speaker]) // 4 - 1 if turn else 50 if speaker else 0
            assert cached == known_tokens
            texts[speaker] = run.text(f"r{number}")
    run.finish(max_steps=9)


def test_a_running_sequence_lends_its_pages_and_they_stay_when_it_ends() -> None:
    run = run_with(10, 10)
    first = toy_submit(1, 20, 30, ignore_eos=True)
    run.submit(first)
    run.step()
    run.submit(again(2, first, 2))
    run.step()
    assert run.executor.shared_tokens == 20
    assert sum(run.scheduler.pages_used_per_rank) == 6 + 1, "five shared, and one each"
    run.abort("r1")
    assert sum(run.scheduler.pages_used_per_rank) == 6
    run.finish(max_steps=9)


def test_salts_keep_tenants_apart() -> None:
    run = run_with(50)
    first = toy_submit(1, 20, 1)
    run.serve(first)
    assert run.serve(again(2, first, cache_salt="a")) == 0
    assert run.serve(again(3, first, cache_salt="b")) == 0
    assert run.serve(again(4, first, cache_salt="a")) == 19
    assert run.serve(again(5, first)) == 19
    run.finish(max_steps=9)


def test_names_depend_on_the_key_the_salt_and_all_that_came_before() -> None:
    namers = (PageNamer(), PageNamer())
    page = token_bytes([1, 2, 3, 4])
    names = {namer.root(salt) for namer in namers for salt in (None, "a", "b", "=")}
    for namer in namers:
        for salt in (None, "a"):
            two = namer.names(namer.root(salt), page + page, len(page))
            assert two == namer.names(namer.root(salt), page, len(page)) + namer.names(two[0], page, len(page))
            names.update(two)
    names.update(namers[0].names(namers[0].root(None), page[4:], len(page)))
    assert len(names) == 8 + 8 + 1


def test_without_the_cache_everything_is_computed_again() -> None:
    run = run_with(20, prefix_cache=False)
    first = toy_submit(1, 20, 1)
    assert run.serve(first) == 0
    assert run.serve(again(2, first)) == 0
    run.finish(max_steps=9)


def test_the_ends_of_what_was_used_longest_ago_are_forgotten_first() -> None:
    """Three texts of five pages fill the pool. Two of them go on, and the room comes off the end of the third, where
    the first page of a text is of use longest."""
    run = run_with(15)
    texts = [toy_submit(number, 20, 1) for number in range(3)]
    for text in texts:
        run.serve(text)
    assert run.serve(again(10, texts[0], 5)) == 20
    assert run.serve(again(12, texts[2], 5)) == 20
    assert run.serve(again(11, texts[1], 1)) == 4
    run.finish(max_steps=9)


def test_a_preempted_sequence_takes_up_what_it_had() -> None:
    computed = {}
    for prefix_cache in (True, False):
        run = run_with(16, 16, prefix_cache=prefix_cache)
        for number in range(10, 16):
            run.submit(toy_submit(number, 20, 40, ignore_eos=True))
        run.finish(max_steps=1000)
        assert run.scheduler.preemptions > 0
        assert all(cached == 0 for cached in run.cached_tokens.values()), "only what others computed counts"
        computed[prefix_cache] = run.executor.computed_tokens
    needed = 6 * (20 + 40 - 1)
    assert needed <= computed[True] < computed[False]


def test_one_prefix_lets_its_users_fill_every_rank() -> None:
    """200 users of 40 shared pages with two pages each on 8 ranks: were owners to follow the prefix, most of the pool
    would stay idle."""
    sharding = KvSharding(page_tokens=T, pages_per_rank=(50,) * 8)
    run = CheckedRun(sharding, BatchOptions(max_batch_tokens=4096, max_sequences=256))
    prefix = toy_submit(1000, 40 * T, 1)
    run.serve(prefix)
    for number in range(200):
        run.submit(again(number, prefix, T + 1))
    run.step()
    assert run.scheduler.num_waiting > 0
    used = run.scheduler.pages_used_per_rank
    assert sum(used) >= 0.9 * sum(sharding.pages_per_rank)
    assert max(used) - min(used) <= 1
    assert run.executor.shared_tokens == run.scheduler.num_running * 40 * T
    run.finish(max_steps=100)


def test_a_private_suffix_starts_on_the_least_loaded_rank() -> None:
    pages = PageAllocator(KvSharding(page_tokens=T, pages_per_rank=(9, 9, 9)))
    prefix = SequencePages(1)
    pages.grow(prefix, 4, expected_pages=4)  # ranks 0, 1, 2, 0
    for ordinal in range(4):
        pages.publish(prefix, ordinal, bytes([ordinal]))
    shared = pages.find([bytes([ordinal]) for ordinal in range(5)])
    assert shared == prefix.numbers
    for sequence_id, ranks in ((2, [1, 2, 0]), (3, [1, 2]), (4, [0])):
        sequence = SequencePages(sequence_id)
        grants = pages.share(sequence, list(shared)) + pages.grow(sequence, len(ranks), expected_pages=7)
        assert [grant.rank for grant in grants[4:]] == ranks
        assert [grant.ordinal for grant in grants] == list(range(4 + len(ranks)))


@pytest.mark.parametrize("last", ["who filled it", "who shares it"])
def test_the_end_of_a_prefix_is_forgotten_first_whoever_held_it_last(last: str) -> None:
    pages = PageAllocator(KvSharding(page_tokens=T, pages_per_rank=(6,)))
    names = [bytes([ordinal]) for ordinal in range(4)]
    filler, sharer = SequencePages(1), SequencePages(2)
    pages.grow(filler, 4, expected_pages=4)
    for ordinal, name in enumerate(names):
        pages.publish(filler, ordinal, name)
    prefix = list(filler.numbers)
    pages.share(sharer, pages.find(names))
    for sequence in (sharer, filler) if last == "who filled it" else (filler, sharer):
        pages.release(sequence)
    assert pages.find(names) == prefix
    pages.grow(SequencePages(3), 4, expected_pages=4)
    assert pages.find(names) == prefix[:2]


def test_of_two_pages_with_one_content_an_idle_one_gives_way_to_one_in_use() -> None:
    pages = PageAllocator(KvSharding(page_tokens=T, pages_per_rank=(9,)))
    older, newer = SequencePages(1), SequencePages(2)
    pages.grow(older, 1, expected_pages=1)
    pages.grow(newer, 1, expected_pages=1)
    pages.publish(older, 0, b"name")
    pages.publish(newer, 0, b"name")
    assert pages.find([b"name"]) == older.numbers, "while both are in use the first is lent"
    pages.release(older)
    pages.publish(newer, 0, b"name")
    assert pages.find([b"name"]) == newer.numbers
    pages.release(newer)
    assert (pages.num_free, pages.used_per_rank) == (9, (0,))
    everything = SequencePages(3)
    assert sorted(grant.page for grant in pages.grow(everything, 9, expected_pages=9)) == list(range(9))
    assert pages.find([b"name"]) == []


def engine_of_one_rank(num_pages: int) -> tuple[Engine, EchoExecutor]:
    executor = EchoExecutor()
    sharding = KvSharding(page_tokens=64, pages_per_rank=(num_pages,))
    return Engine(Scheduler(sharding, BatchOptions(max_batch_tokens=2**20), 2**20 + 200), executor, []), executor


def with_cached(prompt_tokens: int) -> Engine:
    engine, _ = engine_of_one_rank(2 * prompt_tokens // 64 + 9)
    engine.submit(Submit("first", bytes(4 * prompt_tokens), SamplingParams(max_tokens=1)))
    while engine.has_work:
        engine.step()
    return engine


def test_a_lookup_costs_the_same_for_every_page() -> None:
    calls = {}
    for prompt_tokens in (2**14, 2**15, 2**16):
        engine = with_cached(prompt_tokens)
        engine.submit(Submit("again", bytes(4 * prompt_tokens + 4), SamplingParams(max_tokens=9)))
        calls[prompt_tokens] = calls_in(engine.step)
    pages = 2**14 // 64
    assert calls[2**16] - calls[2**15] == 2 * (calls[2**15] - calls[2**14])
    assert calls[2**15] - calls[2**14] <= 20 * pages


def test_a_prompt_that_waits_for_pages_is_not_looked_up_in_every_step() -> None:
    engine, _ = engine_of_one_rank(1030)
    engine.submit(Submit("first", bytes(4 * (2**15 + 640)), SamplingParams(max_tokens=60)))
    engine.step()
    engine.submit(Submit("again", bytes(4 * 2**15) + token_bytes([1] * 2**15), SamplingParams(max_tokens=60)))
    engine.step()
    assert engine.report([]).waiting == 1
    assert calls_in(engine.step) < 200


def test_samples_of_one_prompt_compute_it_once() -> None:
    """n = 4: three follow the first, share its whole pages and copy the last one, and compute a token each."""
    run = run_with(20, 20, 20)
    prompt = toy_submit(0, 22, 1).prompt_token_ids
    for number in range(1, 5):
        run.submit(toy_submit(number, 0, 6, behind=prompt, ignore_eos=True))
    run.step()
    assert (run.scheduler.num_running, run.scheduler.num_waiting) == (1, 3)
    run.step()
    assert (run.scheduler.num_running, run.scheduler.num_waiting) == (4, 0)
    run.finish(max_steps=20)
    assert run.executor.computed_tokens == 22 + 3 + 4 * 5
    assert run.cached_tokens == {"r1": 0, "r2": 21, "r3": 21, "r4": 21}
    assert len({tuple(output) for output in run.outputs.values()}) == 4, "their seeds differ"


def test_long_prompts_that_begin_alike_compute_it_once() -> None:
    """Eight of 100 tokens behind 400 in common, in steps of 64: all follow the first, and then go on together."""
    run = run_with(300, 300)
    prefix = toy_submit(0, 400, 1).prompt_token_ids
    for number in range(1, 9):
        run.submit(toy_submit(number, 100, 2, behind=prefix, ignore_eos=True))
    run.finish(max_steps=100)
    assert run.executor.computed_tokens == 400 + 8 * 101


def test_who_follows_holds_nobody_up() -> None:
    run = run_with(300, 300)
    prefix = toy_submit(0, 640, 1).prompt_token_ids
    run.submit(toy_submit(1, 0, 2, behind=prefix, ignore_eos=True))
    run.step()
    run.submit(toy_submit(2, 9, 2, behind=prefix, ignore_eos=True))
    run.submit(toy_submit(3, 9, 2, ignore_eos=True))
    run.step()
    assert run.outputs["r3"], "it came after one that waits for 640 tokens"
    assert run.scheduler.num_waiting == 1
    run.finish(max_steps=100)
    assert run.executor.computed_tokens <= 640 + 1 + 10 + 10


def test_a_short_prompt_follows_for_one_step_at_most() -> None:
    """It begins like a long one that has just begun; to wait for more of that would take longer than to compute it."""
    run = run_with(300, 300, budget=60)
    prefix = toy_submit(0, 640, 1).prompt_token_ids
    run.submit(toy_submit(1, 0, 2, behind=prefix, ignore_eos=True))
    for number in (2, 3):
        run.submit(toy_submit(number, 640, 2, ignore_eos=True))
    run.submit(toy_submit(5, 0, 2, behind=prefix[: 4 * 30], ignore_eos=True))
    run.step()
    assert run.executor.sequences[1].num_stored == 20
    run.step()
    assert run.outputs["r5"]
    run.finish(max_steps=100)
    assert run.cached_tokens["r5"] == 20


def test_followers_go_on_when_their_leader_is_gone() -> None:
    run = run_with(300, 300)
    prefix = toy_submit(0, 640, 1).prompt_token_ids
    for number in range(1, 4):
        run.submit(toy_submit(number, 5, 2, behind=prefix, ignore_eos=True))
    run.step()
    run.step()
    run.abort("r1")
    run.abort("r3")
    run.finish(max_steps=100)
    assert run.ends["r2"].finish_reason == "length"
    assert run.executor.computed_tokens == 640 + 5 + 1, "what the first had computed is used"


def test_a_copy_is_written_and_its_source_stays_as_it_was() -> None:
    run = run_with(30, 30)
    first = toy_submit(1, 10, 9, ignore_eos=True)
    run.submit(first)
    run.step()
    run.submit(again(2, first, 3))  # goes on otherwise inside the page that the first one still fills
    run.step()
    run.step()
    run.finish(max_steps=30)
    assert run.cached_tokens["r2"] == 10
    assert run.serve(again(3, first)) == 9


def test_a_copy_does_not_outweigh_even_ranks() -> None:
    """All begin with six tokens and go on otherwise: were each to copy the second page, one rank would hold it all."""
    run = run_with(64, 64, 64, 64, budget=4096)
    prefix = toy_submit(0, 6, 1)
    run.serve(prefix)
    for number in range(1, 41):
        run.submit(again(number, prefix, 1))
    run.step()
    used = run.scheduler.pages_used_per_rank
    assert run.scheduler.num_running == 40
    assert max(used) - min(used) <= 4 + 64 // 32 + 1
    run.finish(max_steps=100)


@pytest.mark.slow
def test_time_to_admit_and_release_a_cached_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    engine, executor = engine_of_one_rank(40_000)
    engine.submit(Submit("first", bytes(4 * 2**20), SamplingParams(max_tokens=1)))
    while engine.has_work:
        engine.step()
    admissions_ms, releases_ms = [], []
    for _ in range(9):
        engine.submit(Submit("again", bytes(4 * 2**20 + 4), SamplingParams(max_tokens=100)))
        start = time.perf_counter()
        engine.step()
        encode(executor.batches[-1])
        admissions_ms.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        engine.abort("again")
        releases_ms.append(1e3 * (time.perf_counter() - start))
    assert executor.batches[-1].rows[0].start == 2**20
    with capsys.disabled():
        print(
            f"\n2**20 cached tokens, best of nine: {min(admissions_ms):.1f} ms from the look-up to the encoded batch, "
            f"{min(releases_ms):.1f} ms to give the pages back"
        )
    assert min(admissions_ms) < 50
    assert min(releases_ms) < 50
