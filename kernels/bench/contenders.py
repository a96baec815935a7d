"""Who is measured: the stream-K kernel, the same kernel with a fixed split, and the peers that PyTorch users have.

A contender turns caches into steps, one for each copy of the inputs, every step one decode attention [B, H, D]. It
raises Unsupported, with the reason, for what it cannot do or where it is not installed.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from caches import Caches
from clock import eager_us
from torch import Tensor

from lean_attention import DecodePlan, PagedKV, lean_decode, plan_decode

Step = Callable[[], Tensor]


class Unsupported(Exception):
    """A contender cannot run a case; the message says why."""


@dataclass(frozen=True)
class Prepared:
    steps: list[Step]
    plan_us: float | None = None
    """What is paid once per decode step and not per layer, in microseconds."""
    detail: str = ""


def lean(caches: Caches) -> Prepared:
    """lean_decode on pages, as a server runs it."""
    kv, heads = caches.paged[0], caches.case.heads[0]
    plan = plan_decode(kv, heads)
    plan_us = eager_us(lambda: plan_decode(kv, heads), kv.device)
    return Prepared([partial(_lean_out, caches.q, kv, plan) for kv in caches.paged], plan_us)


def lean_contiguous(caches: Caches) -> Prepared:
    """lean_decode on an unpaged cache."""
    _needs_uniform(caches)
    lengths = caches.paged[0].lengths
    unpaged = [PagedKV.from_contiguous(k, v, lengths) for k, v in caches.contiguous()]
    plan = plan_decode(unpaged[0], caches.case.heads[0])
    return Prepared([partial(_lean_out, caches.q, kv, plan) for kv in unpaged])


def lean_shuffled(caches: Caches) -> Prepared:
    """lean_decode on pages in random order: what a long-lived pool looks like at its worst."""
    kv = caches.paged[0]
    order = torch.randperm(kv.k.shape[0], device=kv.device)
    table = torch.argsort(order)[kv.page_table.long()].int()
    shuffled = [PagedKV(kv.k[order], kv.v[order], table, kv.lengths) for kv in caches.paged]
    plan = plan_decode(shuffled[0], caches.case.heads[0])
    return Prepared([partial(_lean_out, caches.q, kv, plan) for kv in shuffled])


def lean_fixed_split(caches: Caches) -> Prepared:
    """The same Triton kernel, every row cut into equally many pieces: FlashDecoding. The gap is stream-K's gain."""
    from lean_attention.stream_k import plan_stream_k

    kv, heads = caches.paged[0], caches.case.heads[0]
    rows = kv.num_sequences * kv.num_kv_heads
    processors = torch.cuda.get_device_properties(kv.device).multi_processor_count
    splits = flash_decoding_splits(rows, processors, math.ceil(max(caches.case.lengths) / 128))
    stream_k = plan_stream_k(kv, heads, window=None, q_positions=None, fixed_split=splits)
    plan = DecodePlan(heads, None, None, "triton", stream_k=stream_k)
    return Prepared([partial(_lean_out, caches.q, kv, plan) for kv in caches.paged], detail=f"{splits} splits")


def flash_decoding_splits(rows: int, processors: int, blocks: int) -> int:
    """How many pieces FlashAttention-2 cuts each row into: the fewest within 85% of the best filling of whole waves.

    rows are (sequence, KV head) pairs; a row has `blocks` blocks of keys.
    """
    if rows >= 0.8 * processors:
        return 1
    filling = {}
    for splits in range(1, min(128, processors, blocks) + 1):
        waves = rows * splits / processors
        filling[splits] = waves / math.ceil(waves)
    return min(splits for splits, share in filling.items() if share >= 0.85 * max(filling.values()))


def sdpa(caches: Caches) -> Prepared:
    """torch.nn.functional.scaled_dot_product_attention: its flash backend on CUDA, its own choice on the CPU."""
    q = caches.q[:, :, None]
    if not caches.case.uniform:
        return _sdpa_by_sequence(caches)
    if q.device.type == "cuda":
        if q.dtype == torch.float32:
            raise Unsupported("the flash backend has no float32")
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]
    else:

        def attend(k: Tensor, v: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]

    return Prepared([partial(attend, k, v) for k, v in caches.contiguous()])


def _sdpa_by_sequence(caches: Caches) -> Prepared:
    if caches.q.device.type == "cuda":
        raise Unsupported("no ragged batch without padding")
    sequences = []
    for b, length in enumerate(caches.case.lengths):
        kv = caches.paged[0]
        pages = kv.page_table[b, : math.ceil(length / kv.page_tokens)].long()
        dense = [pool[pages].transpose(0, 1).flatten(1, 2)[None, :, :length].contiguous() for pool in (kv.k, kv.v)]
        sequences.append((caches.q[b : b + 1, :, None], *dense))

    def attend() -> Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([attention(q, k, v, enable_gqa=True)[:, :, 0] for q, k, v in sequences])

    return Prepared([attend], detail="one call per sequence")


def flex_decoding(caches: Caches) -> Prepared:
    """torch.nn.attention.flex_attention, compiled for the one shape."""
    _needs_cuda(caches)
    _needs_uniform(caches)
    _, K, D = caches.case.heads
    group = caches.case.heads[0] // K
    if group & (group - 1) or D & (D - 1):
        raise Unsupported("needs powers of two for group and head dim")
    from torch.nn.attention.flex_attention import flex_attention

    # Compiled for this shape alone: torch keeps eight at most of one function, and runs it uncompiled from then on.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    q = caches.q[:, :, None]
    return Prepared([lambda k=k, v=v: compiled(q, k, v, enable_gqa=True)[:, :, 0] for k, v in caches.contiguous()])


def flashinfer(caches: Caches) -> Prepared:
    """FlashInfer's paged decode, planned once, where the package is installed."""
    _needs_cuda(caches)
    if importlib.util.find_spec("flashinfer") is None:
        raise Unsupported("not installed")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # pyright: ignore[reportMissingImports]

    H, K, D = caches.case.heads
    kv, T = caches.paged[0], caches.case.page_tokens
    counts = [math.ceil(n / T) for n in caches.case.lengths]
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    indices = torch.cat([kv.page_table[b, :count] for b, count in enumerate(counts)])
    last = torch.tensor([(n - 1) % T + 1 for n in caches.case.lengths], dtype=torch.int32)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=kv.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=H // K >= 4)

    def plan() -> None:
        wrapper.plan(indptr, indices, last, H, K, D, T, q_data_type=caches.q.dtype, kv_data_type=kv.k.dtype)

    plan_us = eager_us(plan, kv.device)
    return Prepared([lambda kv=kv: wrapper.run(caches.q, (kv.k, kv.v)) for kv in caches.paged], plan_us)


GPU_CONTENDERS: dict[str, Callable[[Caches], Prepared]] = {
    "lean": lean,
    "lean, fixed split": lean_fixed_split,
    "SDPA flash": sdpa,
    "flex_decoding": flex_decoding,
    "FlashInfer": flashinfer,
}
CPU_CONTENDERS: dict[str, Callable[[Caches], Prepared]] = {
    "lean, contiguous": lean_contiguous,
    "lean": lean,
    "lean, shuffled": lean_shuffled,
    "SDPA": sdpa,
}


def _lean_out(q: Tensor, kv: PagedKV, plan: DecodePlan) -> Tensor:
    return lean_decode(q, kv, plan).out


def _needs_cuda(caches: Caches) -> None:
    if caches.q.device.type != "cuda":
        raise Unsupported("needs a GPU")


def _needs_uniform(caches: Caches) -> None:
    if not caches.case.uniform:
        raise Unsupported("needs sequences of one length")
