import msgspec
import pytest

from leanserve.contracts.config import CPU_BATCH, GPU_BATCH
from leanserve.contracts.messages import EngineInfo
from leanserve.launch.capacity import describe_cache, describe_context, describe_steps

INFO = EngineInfo(
    architecture="llama",
    vocab_size=100,
    eos_token_ids=(),
    max_context_tokens=64_000,
    model_max_tokens=131_072,
    page_tokens=64,
    pages_per_rank=(500, 500),
    kv_bytes_per_token=131_072,
    dtype="bfloat16",
    device="GPU",
    attention="triton",
    tokens_of_one_more_rank=32_000,
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "64,000 tokens, what the cache holds (the model's own limit is 131,072); one more rank"),
        ({}, "would make it 96,000"),
        ({"tokens_of_one_more_rank": 90_000}, "one more rank would make it 131,072"),
        ({"tokens_of_one_more_rank": 0}, "a larger --kv-memory would make it more"),
        ({"max_context_tokens": 10_000}, "10,000 tokens, as asked for; auto would be 64,000"),
        ({"max_context_tokens": 25_600, "model_max_tokens": 25_600}, "own limit; the cache holds 2.5 of that"),
    ],
    ids=["cache", "one-more", "cache-then-model", "shared-memory", "asked-for", "model"],
)
def test_the_context_is_told_with_what_bounds_it(changes: dict, says: str) -> None:
    assert says in describe_context(msgspec.structs.replace(INFO, **changes))


def test_the_cache_is_told_in_pages_tokens_and_bytes() -> None:
    assert describe_cache(INFO) == (
        "500 pages of 64 tokens per rank, 64,000 tokens in all: 7.81 GiB, 131,072 bytes a token, "
        "65,536 on each of 2 ranks"
    )
    uneven = msgspec.structs.replace(INFO, pages_per_rank=(500, 0, 300))
    assert describe_cache(uneven).startswith("0 to 500 pages of 64 tokens per rank, 51,200 tokens in all")


def test_steps_are_told_with_and_without_streams() -> None:
    assert describe_steps(GPU_BATCH) == "of up to 2,048 tokens"
    assert describe_steps(CPU_BATCH) == "of up to 512 tokens, 2,048 while no stream runs"
