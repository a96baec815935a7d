"""GPU types as data. Peaks are the vendors' own figures for dense bfloat16 with float32 accumulation."""

from dataclasses import dataclass

from leanserve.contracts.errors import ConfigError

__all__ = ["GPUS", "Gpu", "find_gpu"]

TB = 1e12
GB = 1e9
USABLE = 0.99 * 2**30
"""Bytes that a program sees of each gigabyte that is sold: vendors mean 2**30 here, and drivers keep about 1%."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One type of accelerator."""

    name: str
    memory_bytes: float
    """That a program can use."""
    bandwidth: float
    """Bytes/s of its memory, peak."""
    flops: float
    """Dense bfloat16 FLOP/s, peak."""
    link: float
    """Bytes/s to its neighbours, each way: NVLink or Infinity Fabric where the board has it, else PCIe."""
    source: str
    """Where the figures are from."""


GPUS = tuple(
    Gpu(
        name=name,
        memory_bytes=memory * USABLE,
        bandwidth=bandwidth * TB,
        flops=flops * TB,
        link=link * GB,
        source=source,
    )
    for name, memory, bandwidth, flops, link, source in (
        ("A100-40GB", 40, 1.555, 312, 300, "NVIDIA A100 data sheet, SXM"),
        ("A100-80GB", 80, 2.039, 312, 300, "NVIDIA A100 data sheet, SXM"),
        ("A10", 24, 0.600, 125, 32, "NVIDIA A10 data sheet, PCIe 4.0 x16"),
        ("L4", 24, 0.300, 121, 32, "NVIDIA L4 data sheet, half of the figure with sparsity, PCIe 4.0 x16"),
        ("L40S", 48, 0.864, 362, 32, "NVIDIA L40S data sheet, PCIe 4.0 x16"),
        ("RTX4090", 24, 1.008, 165, 32, "NVIDIA Ada architecture paper, PCIe 4.0 x16"),
        ("H100", 80, 3.35, 989, 450, "NVIDIA H100 data sheet, SXM, half of the figure with sparsity"),
        ("H100-PCIE", 80, 2.0, 756, 64, "NVIDIA H100 data sheet, PCIe 5.0 x16, half of the figure with sparsity"),
        ("H200", 141, 4.8, 989, 450, "NVIDIA H200 data sheet, SXM, half of the figure with sparsity"),
        ("B200", 180, 8.0, 2250, 900, "NVIDIA DGX B200 data sheet, an eighth, half of the figure with sparsity"),
        ("MI300X", 192, 5.3, 1307, 448, "AMD Instinct MI300X data sheet, seven Infinity Fabric links"),
        ("MI355X", 288, 8.0, 2500, 538, "AMD Instinct MI355X data sheet, seven Infinity Fabric links"),
    )
)


def find_gpu(name: str) -> Gpu:
    """The GPU type of that name, in any case.

    Raises:
        ConfigError: there is none; the message lists all.
    """
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise ConfigError(f"GPU type {name!r} is not in the table; it has {known}")
