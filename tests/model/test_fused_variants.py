"""The kernels between a layer's products compile ahead of time, without a GPU, and keep their registers."""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lean_attention.ahead_of_time import Variant, compile_all
from leanserve.model.fused import (
    HEADS_WARPS,
    SWIGLU_WARPS,
    heads_constants,
    heads_kernel,
    norm_constants,
    norm_kernel,
    norm_warps,
    swiglu_constants,
    swiglu_kernel,
)


def _launch(num_warps: int) -> dict[str, int | bool]:
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def _norm(width: int, dtype: str, *, adds: bool = True) -> Variant:
    types = {f"{name}_ptr": f"*{dtype}" for name in ("x", "delta", "weight", "out")} | {"eps": "fp32"}
    constants: dict[str, Any] = norm_constants(width)
    name = f"{'add-' if adds else ''}norm-c{width}-{dtype}"
    return Variant(
        name, norm_kernel, types, constants | ({} if adds else {"delta_ptr": None}), _launch(norm_warps(width))
    )


def _heads(head_dim: int, dtype: str, *, norms: bool = True, rotates: bool = True) -> Variant:
    types = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "cos", "sin")} | {"eps": "fp32"}
    constants: dict[str, Any] = heads_constants(head_dim)
    constants |= {} if norms else {"weight_ptr": None}
    constants |= {} if rotates else {"cos_ptr": None, "sin_ptr": None}
    name = f"heads-d{head_dim}-{dtype}{'-norm' if norms else ''}{'-rope' if rotates else ''}"
    return Variant(name, heads_kernel, types, constants, _launch(HEADS_WARPS))


def _swiglu(width: int, dtype: str) -> Variant:
    types = {"gate_up_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    return Variant(
        f"swiglu-j{width}-{dtype}", swiglu_kernel, types, dict(swiglu_constants(width)), _launch(SWIGLU_WARPS)
    )


def fused_variants(architecture: str) -> list[Variant]:
    """What the models of this project run, and the widest."""
    return [
        _norm(4096, "bf16", adds=False),
        _norm(576, "bf16"),
        _norm(4096, "bf16"),
        _norm(16384, "fp32"),
        _heads(128, "bf16"),
        _heads(128, "fp16", norms=False),
        _heads(80, "fp32", rotates=False),
        _swiglu(14336, "bf16"),
    ]


@pytest.mark.timeout(900)
def test_they_compile_without_spills() -> None:
    architectures = ["sm_80", "sm_90", "sm_100"]
    results = list(compile_all(fused_variants, architectures, jobs=1))
    assert len(results) == sum(len(fused_variants(architecture)) for architecture in architectures)
    assert {(r.variant, r.architecture): r.error for r in results if r.error} == {}
    assert {(r.variant, r.architecture): r.stack_bytes for r in results if r.stack_bytes} == {}


def test_every_batch_size_runs_the_same_binary() -> None:
    """Of what the kernels are told beside pointers, strides and the model's own sizes, only `rows` varies."""
    kernel = heads_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))

    def binary(rows: int) -> str:
        given = {"rows": rows, "eps": 1e-5, "heads": 5} | heads_constants(128)
        default = {p.name: torch.zeros(4) if p.name.endswith("_ptr") else 64 for p in kernel.params}
        return str(bind(**(default | given))[1])

    assert binary(1) == binary(16) == binary(17)
