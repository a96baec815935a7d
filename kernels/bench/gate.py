"""No time is printed for a wrong result: the checks that stand before every measurement."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from caches import Caches
from torch import Tensor

from lean_attention import PagedKV, lean_decode, plan_decode, reference

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2e-2, "float8_e4m3fn": 2e-2}
CHECKED_SEQUENCES = 4


class GateError(Exception):
    """A result is wrong; the message says which and by how much."""


@dataclass(frozen=True)
class Expected:
    sequences: Tensor
    """[n] int64: the sequences that are checked."""
    out: Tensor
    """[n, H, D] float32."""


CHECKED_DTYPES = ("float32", "bfloat16", "float16")


def check_against_reference(device: torch.device, dtypes: Sequence[str] = CHECKED_DTYPES) -> float:
    """lean_decode on edge lengths, for every layout of heads, against the float64 reference; the largest error seen."""
    worst = 0.0
    generator = torch.Generator().manual_seed(5)
    for dtype in dtypes:
        for H, K, D in ((32, 8, 128), (8, 1, 128), (28, 4, 128), (4, 4, 64), (16, 1, 64)):
            T = 64
            lengths = torch.tensor([0, 1, T - 1, T, T + 1, 40 * T + 7], dtype=torch.int32)
            pages = [-(-int(n) // T) for n in lengths]
            table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
            ids = torch.randperm(sum(pages), generator=generator).int().split(pages)
            for b, row in enumerate(ids):
                table[b, : len(row)] = row
            pool = [torch.full((sum(pages), K, T, D), float("nan")) for _ in range(2)]
            for b, n in enumerate(lengths.tolist()):
                for j in range(pages[b]):
                    slots = min(T, n - j * T)
                    for half in pool:
                        half[table[b, j], :, :slots] = torch.randn(K, slots, D, generator=generator)
            k, v = (half.to(device, getattr(torch, dtype)) for half in pool)
            kv = PagedKV(k, v, table.to(device), lengths.to(device))
            q = torch.randn(len(pages), H, D, generator=generator).to(device, k.dtype)
            plan = plan_decode(kv, H)
            actual, expected = lean_decode(q, kv, plan), reference.lean_decode(q, kv, plan)
            error = _error(actual.out, expected.out, dtype, f"lean_decode {H}/{K}/{D} {dtype}")
            empty = expected.lse == float("-inf")
            if not torch.equal(actual.lse == float("-inf"), empty):
                raise GateError(f"lean_decode {H}/{K}/{D} {dtype}: lse is -inf where keys were seen, or the reverse")
            _error(actual.lse[~empty], expected.lse[~empty], dtype, f"lse of lean_decode {H}/{K}/{D} {dtype}")
            worst = max(worst, error)
    return worst


def expected_of(caches: Caches) -> Expected:
    """What a case must give, for its longest, its shortest and two other sequences: from the float64 reference on the
    CPU, and on a GPU from the portable path in float32, which `check_against_reference` has not used there."""
    case, kv = caches.case, caches.paged[0]
    by_length = sorted(range(len(case.lengths)), key=lambda b: case.lengths[b])
    chosen = sorted({by_length[0], by_length[-1], *by_length[:: max(1, len(by_length) // 2)][:CHECKED_SEQUENCES]})
    some = torch.tensor(chosen, device=kv.device)
    few = PagedKV(kv.k, kv.v, kv.page_table[some].contiguous(), kv.lengths[some])
    if kv.device.type == "cpu":
        state = reference.lean_decode(caches.q[some], few, plan_decode(few, case.heads[0]))
    else:
        plan = plan_decode(few, case.heads[0], backend="portable")
        state = lean_decode(caches.q[some], few, plan)
    return Expected(some, state.out)


def check(out: Tensor, expected: Expected, dtype: str, what: str) -> None:
    """Raise GateError unless out [B, H, D] agrees on the checked sequences."""
    _error(out[expected.sequences].float(), expected.out, dtype, what)


def _error(actual: Tensor, expected: Tensor, dtype: str, what: str) -> float:
    if actual.isnan().any():
        raise GateError(f"{what}: {int(actual.isnan().sum())} NaN")
    error = float((actual.float() - expected.float()).abs().max()) if actual.numel() else 0.0
    if error > TOLERANCE[dtype]:
        raise GateError(f"{what}: max error {error:.3g}, allowed {TOLERANCE[dtype]:.3g}")
    return error
