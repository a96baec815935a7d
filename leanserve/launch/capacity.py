"""What an engine's steps and KV cache hold, and what would make the cache hold more: the banner's lines, in words."""

from leanserve.contracts.config import BatchOptions
from leanserve.contracts.messages import EngineInfo

__all__ = ["describe_cache", "describe_context", "describe_steps"]


def describe_steps(batch: BatchOptions) -> str:
    """Tokens of one step."""
    with_streams = f"of up to {batch.max_batch_tokens:,} tokens"
    if batch.longest_step_tokens == batch.max_batch_tokens:
        return with_streams
    return f"{with_streams}, {batch.longest_step_tokens:,} while no stream runs"


def describe_cache(info: EngineInfo) -> str:
    """The pools: pages of each rank, tokens in all, and bytes of a token."""
    pages = sorted(set(info.pages_per_rank))
    pages_text = f"{pages[0]:,}" if len(pages) == 1 else f"{pages[0]:,} to {pages[-1]:,}"
    tokens = _cache_tokens(info)
    num_ranks = len(info.pages_per_rank)
    per_rank = f", {info.kv_bytes_per_token // num_ranks:,} on each of {num_ranks} ranks" if num_ranks > 1 else ""
    return (
        f"{pages_text} pages of {info.page_tokens} tokens per rank, {tokens:,} tokens in all: "
        f"{tokens * info.kv_bytes_per_token / 2**30:.2f} GiB, {info.kv_bytes_per_token:,} bytes a token{per_rank}"
    )


def describe_context(info: EngineInfo) -> str:
    """The longest context, what bounds it, and what it would be with one rank more."""
    longest, model, cache = info.max_context_tokens, info.model_max_tokens, _cache_tokens(info)
    if longest == model:
        times = cache / longest
        return f"up to {longest:,} tokens, the model's own limit; the cache holds {times:.1f} of that"
    if longest < cache:
        return f"up to {longest:,} tokens, as asked for; auto would be {min(model, cache):,}"
    said = f"up to {longest:,} tokens, what the cache holds (the model's own limit is {model:,}); "
    if info.tokens_of_one_more_rank:
        return said + f"one more rank would make it {min(model, longest + info.tokens_of_one_more_rank):,}"
    return said + "a larger --kv-memory would make it more"


def _cache_tokens(info: EngineInfo) -> int:
    return sum(info.pages_per_rank) * info.page_tokens
