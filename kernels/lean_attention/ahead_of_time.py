"""Kernels compiled without their GPU, and what the compiler made of them. Knows no kernel by name.

Compiling needs Triton alone. What it made is read from the binary: registers per thread, bytes spilled to the stack,
shared memory, and asynchronous copies (a pipelined kernel has them, a kernel whose loop the pipeliner gave up on has
not).
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lean_attention.tuning import interpreting

__all__ = ["ARCHITECTURES", "Compiled", "Variant", "compile_all"]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950")


@dataclass(frozen=True)
class Variant:
    """One binary: a kernel, the types of its arguments, its constants and its launch options."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Types of the pointers and floats; other runtime arguments are i32."""
    constants: dict[str, Any]
    """Constexpr arguments, and optional ones that are None."""
    launch: dict[str, int | bool]
    """The options of a launch: warps, stages, and registers where they are limited."""

    def compile(self, architecture: str) -> Any:
        """Triton's CompiledKernel for one of `ARCHITECTURES`. Specialised as a launch on aligned tensors is."""
        if interpreting():
            raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
        signature: dict[str, str] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for index, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
                continue
            signature[name] = self.types.get(name, "i32")
            varies = self.kernel.params[index].do_not_specialize
            if name.endswith("_ptr") or ("_stride_" in name and not varies):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, self.constants, attributes)
        return triton.compile(source, target=target_of(architecture), options=self.launch)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant."""

    variant: str
    architecture: str
    registers: int
    stack_bytes: int
    """Per thread; more than 0 means that registers were spilled."""
    shared_bytes: int
    async_copies: int
    """Copy instructions from global to shared memory (16 bytes to a thread) in the text."""
    seconds: float
    error: str | None = None


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def _compile_one(listed: Callable[[str], list[Variant]], name: str, architecture: str) -> Compiled:
    """In a worker process: compile one variant into a cache of its own, so that it is compiled and not found."""
    variant = next(v for v in listed(architecture) if v.name == name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            kernel = variant.compile(architecture)
        except Exception as error:  # whatever a compiler pass raises is the row's result
            text = f"{type(error).__name__}: {error}"
            return Compiled(name, architecture, 0, 0, 0, 0, time.monotonic() - began, text)
        registers, stack_bytes = _read_cubin(kernel.asm["cubin"]) if "cubin" in kernel.asm else _read_amdgcn(kernel.asm)
    copies = len(re.findall(r"cp\.async\.c[ga]\.shared", kernel.asm.get("ptx", "")))
    seconds = time.monotonic() - began
    return Compiled(name, architecture, registers, stack_bytes, kernel.metadata.shared, copies, seconds)


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, stack and local bytes) of a cubin's kernel, by the cuobjdump that Triton ships."""
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    """(vector registers, bytes of spilled ones) of an AMD kernel, from its metadata."""
    count = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", asm["amdgcn"])}
    return count["vgpr_count"], 4 * count["vgpr_spill_count"]


def compile_all(
    listed: Callable[[str], list[Variant]], architectures: Iterable[str], *, only: str = "", jobs: int | None = None
) -> Iterator[Compiled]:
    """Compile the variants whose names hold `only` for each architecture in `jobs` processes; results in order.

    `listed` gives the variants of an architecture: a function that other processes can import.
    """
    work = [(listed, v.name, arch) for arch in architectures for v in listed(arch) if only in v.name]
    # Spawned and not forked: LLVM's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(_compile_one, *zip(*work, strict=True), chunksize=1) if work else ()
