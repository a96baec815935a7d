"""Every compiled variant of the kernels, in one list; compile them ahead of time, on any machine.

    python -m lean_attention.variants                         every variant for every architecture, as a table
    python -m lean_attention.variants --arch sm_90 --only decode
    python -m lean_attention.variants --out kernels/variants.md

The table gives what the compiler made of each variant (`ahead_of_time.Compiled`). Its numbers are those of the binary,
not of a run.
"""

import argparse
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from lean_attention.ahead_of_time import ARCHITECTURES, Compiled, Variant, compile_all
from lean_attention.append import append_constants, append_kernel
from lean_attention.flash_prefill import prefill_constants, prefill_kernel
from lean_attention.merge import merge_constants, merge_kernel
from lean_attention.stream_k import decode_constants, decode_kernel
from lean_attention.stream_k_plan import PAGES_AT_ONCE, SEQUENCES_AT_ONCE, deal_kernel, visible_kernel
from lean_attention.tuning import (
    ArchFamily,
    decode_launch,
    decode_tuning,
    dot_precision,
    nvidia_family,
    prefill_tuning,
)

__all__ = ["SHARED_BYTES_PER_SM", "family_of", "main", "variants"]

SHARED_BYTES_PER_SM = {"sm_80": 164 << 10, "sm_89": 100 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
"""Of NVIDIA's (CUDA C++ Programming Guide, technical specifications by compute capability)."""

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
}
"""Triton's names."""

CONTIGUOUS = 1 << 30
"""The page size of caches with one page to a sequence."""


def family_of(architecture: str) -> ArchFamily:
    if not architecture.startswith("sm_"):
        return "cdna"
    return nvidia_family(int(architecture[3:]) // 10, SHARED_BYTES_PER_SM[architecture])


def _softmax_types(q: str, kv: str, out: str) -> dict[str, str]:
    pointers = {"q": q, "k": kv, "v": kv, "out": out}
    pointers |= dict.fromkeys(("sinks", "k_scale", "v_scale", "lse", "scratch"), "fp32")
    pointers |= dict.fromkeys(("table", "positions", "lengths", "q_positions", "q_offsets", "work"), "i32")
    return {f"{name}_ptr": f"*{dtype}" for name, dtype in pointers.items()} | {"scale_log2": "fp32", "softcap": "fp32"}


def _absent(**arguments: bool) -> dict[str, None]:
    """Of the optional arguments of a kernel, those that are not given, as constants."""
    return {name: None for name, is_given in arguments.items() if not is_given}


def _name(kernel: str, head_dim: int, group: int, q: str, kv: str, page: int, options: dict[str, bool]) -> str:
    parts = [f"{kernel}-d{head_dim}-g{group}", q if q == kv else f"{q}x{kv}"]
    parts.append("contiguous" if page == CONTIGUOUS else f"page{page}")
    return "-".join([*parts, *(name for name, on in options.items() if on)])


def _decode(
    family: ArchFamily, head_dim: int, group: int, *, q: str = "bf16", kv: str = "bf16", out: str = "fp32",
    page: int = 64, window: bool = False, sharded: bool = False, softcap: bool = False, sinks: bool = False,
) -> Variant:  # fmt: skip
    tuning = decode_tuning(head_dim, DTYPES[kv], family)
    constants: dict[str, Any] = decode_constants(
        head_dim, group, tile=tuning.tile, page_tokens=page, num_stages=tuning.num_stages, fan_in=tuning.fan_in,
        precision=dot_precision(DTYPES[q], family),
    )  # fmt: skip
    positions = window and sharded
    constants |= _absent(window=window, positions_ptr=positions, q_positions_ptr=positions)
    constants |= _absent(softcap=softcap, sinks_ptr=sinks, k_scale_ptr=kv == "fp8e4nv", v_scale_ptr=kv == "fp8e4nv")
    options = {"window": window, "sharded": sharded, "softcap": softcap, "sinks": sinks, "rounded": out != "fp32"}
    name = _name("decode", head_dim, group, q, kv, page, options)
    launch = decode_launch(tuning.num_warps, tuning.num_stages, tuning.ctas_per_sm, family)
    return Variant(name, decode_kernel, _softmax_types(q, kv, out), constants, launch)


def _prefill(
    family: ArchFamily, head_dim: int, group: int, *, q: str = "bf16", kv: str = "bf16", page: int = 64,
    window: bool = False, sharded: bool = False, softcap: bool = False, sinks: bool = False,
) -> Variant:  # fmt: skip
    tuning = prefill_tuning(head_dim, DTYPES[q], family)
    constants: dict[str, Any] = prefill_constants(
        head_dim, group, rows=tuning.rows, tile=tuning.tile, page_tokens=page, num_stages=tuning.num_stages,
        precision=dot_precision(DTYPES[q], family),
    )  # fmt: skip
    constants |= _absent(window=window, positions_ptr=sharded)
    constants |= _absent(softcap=softcap, sinks_ptr=sinks, k_scale_ptr=kv == "fp8e4nv", v_scale_ptr=kv == "fp8e4nv")
    options = {"window": window, "sharded": sharded, "softcap": softcap, "sinks": sinks}
    name = _name("prefill", head_dim, group, q, kv, page, options)
    launch = _launch(tuning.num_warps, tuning.num_stages)
    return Variant(name, prefill_kernel, _softmax_types(q, kv, "fp32"), constants, launch)


def _launch(num_warps: int = 4, num_stages: int = 3) -> dict[str, int | bool]:
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def _plans() -> Iterator[Variant]:
    pointers = ("lengths", "q_positions", "visible", "work", "page_positions")
    types = {f"{name}_ptr": "*i32" for name in pointers}
    deal = {"BLOCK": SEQUENCES_AT_ONCE}
    unused = {"q_positions_ptr": None, "visible_ptr": None}
    yield Variant("plan", deal_kernel, types, deal | unused | {"window": None}, _launch())
    yield Variant("plan-window", deal_kernel, types, deal | unused, _launch())
    yield Variant(
        "plan-window-sharded", deal_kernel, types, deal | {"q_positions_ptr": None, "window": None}, _launch()
    )
    yield Variant("visible-window-sharded", visible_kernel, types, {"BLOCK": PAGES_AT_ONCE}, _launch())


def _merge(head_dim: int, dtype: str) -> Variant:
    types = {"out_parts_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "lse_parts_ptr": "*fp32", "lse_ptr": "*fp32"}
    constants = dict(merge_constants(head_dim, 32, (32 * head_dim, head_dim)))
    return Variant(f"merge-d{head_dim}-{dtype}", merge_kernel, types, constants, _launch())


def _append(kv_heads: int, head_dim: int, new: str, kv: str) -> Variant:
    types = {"k_new_ptr": f"*{new}", "v_new_ptr": f"*{new}", "k_ptr": f"*{kv}", "v_ptr": f"*{kv}"}
    types |= {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "pages_ptr": "*i32", "slots_ptr": "*i32"}
    constants: dict[str, Any] = append_constants(kv_heads, head_dim, DTYPES[kv])
    if kv != "fp8e4nv":
        constants |= {"k_scale_ptr": None, "v_scale_ptr": None}
    return Variant(f"append-k{kv_heads}-d{head_dim}-{new}x{kv}", append_kernel, types, constants, _launch())


def variants(architecture: str = "sm_90") -> list[Variant]:
    """The default list: what the models and the benchmarks of this project run. At most 40."""
    family = family_of(architecture)
    fp8 = architecture not in ("sm_80", "gfx942")  # e4m3 as torch.float8_e4m3fn begins with sm_89 and gfx950
    found = [
        *(_decode(family, 64, group) for group in (1, 4, 8)),
        *(_decode(family, 128, group) for group in (1, 4, 5, 7, 8, 16)),
        *(_decode(family, head_dim, 4) for head_dim in (80, 96, 192)),
        *(_decode(family, 256, group) for group in (2, 8)),
        *(_decode(family, head_dim, 8, page=16) for head_dim in (64, 128)),
        _decode(family, 128, 4, out="bf16", page=128),
        _decode(family, 128, 32, page=CONTIGUOUS),
        _decode(family, 128, 4, q="fp16", kv="fp16"),
        *(_decode(family, head_dim, 4, q="fp32", kv="fp32") for head_dim in (64, 128)),
        _decode(family, 64, 8, sinks=True),
        _decode(family, 64, 8, window=True, sharded=True, sinks=True),
        _decode(family, 64, 8, window=True, sharded=True, page=16),
        _decode(family, 128, 4, window=True),
        _decode(family, 256, 2, window=True, sharded=True, softcap=True),
        _prefill(family, 64, 8, page=16, sharded=True),
        _prefill(family, 128, 4),
        _prefill(family, 128, 8, sharded=True),
        _prefill(family, 128, 4, q="fp32", kv="fp32", sharded=True),
        _prefill(family, 256, 2, window=True, sharded=True, softcap=True),
        *_plans(),
        _merge(128, "fp32"),
        _append(8, 128, "bf16", "bf16"),
    ]
    if fp8:
        found += [_decode(family, 128, 8, kv="fp8e4nv"), _prefill(family, 128, 4, kv="fp8e4nv")]
        found += [_append(8, 128, "bf16", "fp8e4nv")]
    return found


def _table(results: list[Compiled]) -> str:
    lines = [
        "| variant | architecture | registers | spilled bytes | shared bytes | async copies |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for r in results:
        if r.error is not None:
            lines.append(f"| {r.variant} | {r.architecture} | failed: {r.error.splitlines()[0][:80]} | | | |")
            continue
        lines.append(
            f"| {r.variant} | {r.architecture} | {r.registers} | {r.stack_bytes} | {r.shared_bytes} | "
            f"{r.async_copies} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lean_attention.variants",
        description="Compile every variant of the LeanAttention kernels ahead of time and print what the compiler made "
        "of it. Needs no GPU. Exits with 1 if a variant does not compile.",
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="architecture; repeat for several (all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name holds TEXT, as decode-d128")
    parser.add_argument("--jobs", type=int, metavar="N", help="compiler processes (one per core)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table here, as Markdown")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    architectures = options.arch or ARCHITECTURES
    if options.list:
        for architecture in architectures:
            for variant in variants(architecture):
                print(f"{architecture}  {variant.name}")
        return 0
    total = sum(options.only in v.name for arch in architectures for v in variants(arch))
    results: list[Compiled] = []
    for result in compile_all(variants, architectures, only=options.only, jobs=options.jobs):
        results.append(result)
        outcome = f"{result.seconds:.1f} s" if result.error is None else "failed"
        print(f"[{len(results)}/{total}] {result.architecture} {result.variant} {outcome}", file=sys.stderr, flush=True)
    failed = [r for r in results if r.error is not None]
    spilled = [r for r in results if r.stack_bytes]
    table = _table(results)
    print(table)
    print(f"\n{len(results)} variants, {len(failed)} failed, {len(spilled)} spill")
    for r in failed:
        print(f"{r.architecture} {r.variant}: {r.error}", file=sys.stderr)
    if options.out is not None:
        date = datetime.datetime.now(datetime.UTC).date()
        options.out.write_text(
            f"# Compiled variants\n\nTriton {triton.__version__}, {date}, by `python -m lean_attention.variants`. Read "
            f"from the binaries; nothing here was run.\n\n{table}\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
