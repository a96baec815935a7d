"""Every shipped kernel variant compiles ahead of time, without a GPU, and keeps its registers."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lean_attention import variants as variants_module
from lean_attention.ahead_of_time import ARCHITECTURES, Compiled, Variant, compile_all
from lean_attention.flash_prefill import prefill_kernel
from lean_attention.merge import merge_kernel
from lean_attention.stream_k import decode_kernel
from lean_attention.stream_k_plan import deal_kernel
from lean_attention.tuning import decode_tuning, nvidia_family
from lean_attention.variants import SHARED_BYTES_PER_SM, family_of, main, variants

TABLE = Path(__file__).parents[2] / "kernels" / "variants.md"


MORE_GROUPS = re.compile(r"decode-d(64-g[18]|128-g[458]|256-g2)-bf16-page64$")
"""Variants that differ from another in the group alone, where such a group, or one that fills as many rows, is listed
with another head dimension, page or type."""


def fewer_groups(architecture: str) -> list[Variant]:
    return [variant for variant in variants(architecture) if not MORE_GROUPS.match(variant.name)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("listed", [fewer_groups, pytest.param(variants, marks=pytest.mark.slow)])
def test_the_default_list_compiles_for_hopper_without_spills(listed):
    results = list(compile_all(listed, ["sm_90"]))
    assert len(results) == len(listed("sm_90"))
    assert 30 < len(results) <= 40
    assert {r.variant: r.error for r in results if r.error} == {}
    served_often = [r for r in results if re.search(r"-d(64|128)-", r.variant)]
    assert {r.variant: r.stack_bytes for r in served_often if r.stack_bytes} == {}
    # The grid counts on three of these at once on a multiprocessor.
    assert {
        r.variant: r.registers
        for r in results
        if "decode-d64" in r.variant and "bf16" in r.variant and r.registers > 168
    } == {}
    # A loop that the pipeliner gave up on copies nothing ahead of its use.
    attention = [r for r in results if r.variant.startswith(("decode", "prefill"))]
    assert {r.variant: r.async_copies for r in attention if r.async_copies < 8} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_committed_table_lists_every_variant(architecture):
    names = [v.name for v in variants(architecture)]
    assert len(set(names)) == len(names)
    rows = re.findall(rf"^\| (\S+) \| {architecture} \|", TABLE.read_text(), flags=re.MULTILINE)
    assert rows == names


def tightest(architecture: str) -> list[Variant]:
    """Beside the default list: what takes the most shared memory of each row of the tables, for a window takes a tile
    more."""
    everything: dict[str, Any] = {"window": True, "sharded": True, "softcap": True}
    family, head_dims = family_of(architecture), (64, 128, 256)
    decode_types = [("bf16", "bf16"), ("fp32", "fp32"), *([] if architecture == "sm_80" else [("bf16", "fp8e4nv")])]
    found = [
        variants_module._decode(family, d, 4, q=q, kv=kv, **everything) for q, kv in decode_types for d in head_dims
    ]
    found += [
        variants_module._prefill(family, d, 4, q=q, kv=q, **everything) for q in ("bf16", "fp32") for d in head_dims
    ]
    return found


def shared_bytes_needed(variant: Variant, shared_bytes: int, architecture: str) -> int:
    """Of one multiprocessor: 1 KB a CTA beside what the kernel uses, for as many CTAs as the grid counts on."""
    ctas = 1
    if variant.kernel is decode_kernel:
        dtype = variants_module.DTYPES[variant.types["k_ptr"].removeprefix("*")]
        ctas = decode_tuning(variant.constants["HEAD_DIM"], dtype, family_of(architecture)).ctas_per_sm
    return ctas * (shared_bytes + 1024)


@pytest.mark.parametrize("architecture", SHARED_BYTES_PER_SM)
def test_the_ctas_that_the_grid_counts_on_fit(architecture):
    rows = re.findall(rf"^\| (\S+) \| {architecture} \| \d+ \| \d+ \| (\d+) \|", TABLE.read_text(), flags=re.MULTILINE)
    listed = {v.name: v for v in variants(architecture)}
    assert len(rows) == len(listed)
    needed = {name: shared_bytes_needed(listed[name], int(shared), architecture) for name, shared in rows}
    assert {n: b for n, b in needed.items() if b > SHARED_BYTES_PER_SM[architecture]} == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", SHARED_BYTES_PER_SM)
def test_they_fit_with_a_window_too(architecture):
    """Compiled here and now."""
    listed = {v.name: v for v in tightest(architecture)}
    results = list(compile_all(tightest, [architecture]))
    assert {r.variant: r.error for r in results if r.error} == {}
    needed = {r.variant: shared_bytes_needed(listed[r.variant], r.shared_bytes, architecture) for r in results}
    assert len(needed) == len(listed) >= 12
    assert {n: b for n, b in needed.items() if b > SHARED_BYTES_PER_SM[architecture]} == {}


def test_little_shared_memory_makes_a_family_whatever_the_generation():
    for major, shared_kb, family in (
        (8, 164, "ampere"), (8, 100, "ada"), (9, 228, "hopper"), (10, 228, "blackwell"), (12, 100, "ada"),
    ):  # fmt: skip
        assert nvidia_family(major, shared_kb << 10) == family


def test_a_variant_that_fails_is_named_and_fails_the_command(monkeypatch, capsys, tmp_path):
    failed = Compiled("decode-x", "sm_90", 0, 0, 0, 0, 0.1, "CompilationError: no such thing")
    monkeypatch.setattr(variants_module, "compile_all", lambda *_args, **_options: iter([failed]))
    assert main(["--arch", "sm_90", "--out", str(tmp_path / "table.md")]) == 1
    printed = capsys.readouterr()
    assert "decode-x: CompilationError: no such thing" in printed.err
    assert "1 failed" in printed.out
    assert "| decode-x | sm_90 | failed: CompilationError" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("kernel", "step", "other"),
    [
        (
            decode_kernel,
            {"batch": 1, "num_ctas": 132, "table_width": 16, "table_stride": 16, "window": 1, "positions_stride": 1},
            {"batch": 16, "num_ctas": 1, "table_width": 1, "table_stride": 7, "window": 128, "positions_stride": 16},
        ),
        (prefill_kernel, {"batch": 1, "table_width": 16, "window": 1}, {"batch": 16, "table_width": 1, "window": 512}),
        (deal_kernel, {"batch": 1, "num_ctas": 16, "search_steps": 1}, {"batch": 16, "num_ctas": 1, "search_steps": 5}),
        (
            merge_kernel,
            {"states": 1, "heads": 16, "out_stride_n": 16, "out_stride_b": 7, "lse_stride_n": 1, "lse_stride_b": 16},
            {"states": 8, "heads": 1, "out_stride_n": 7, "out_stride_b": 16, "lse_stride_n": 16, "lse_stride_b": 1},
        ),
    ],
)
def test_nothing_that_changes_between_steps_is_specialised_on(kernel, step, other):
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))

    def binary(**runtime: int) -> str:
        arguments: dict[str, object] = {}
        for parameter in kernel.params:
            name = parameter.name
            default: object = torch.zeros(4) if name.endswith("_ptr") else 64
            arguments[name] = runtime.get(name, 1.5 if name in ("scale_log2", "softcap") else default)
        return str(bind(**arguments)[1])

    assert binary(**step) == binary(**other)
    assert binary(**step) != binary(**step, **{"HEAD_DIM" if "HEAD_DIM" in kernel.arg_names else "BLOCK": 32})
