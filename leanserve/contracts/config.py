"""What the user chose: a frozen dataclass per stage, checked once. What a machine makes of it is computed elsewhere."""

from dataclasses import dataclass, field
from typing import Literal

from leanserve.contracts.errors import ConfigError

__all__ = [
    "CPU_BATCH",
    "GPU_BATCH",
    "AttentionBackend",
    "BatchOptions",
    "CacheOptions",
    "Comm",
    "DType",
    "Device",
    "EngineConfig",
    "Weights",
]

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cuda", "cpu"]
Comm = Literal["auto", "nccl", "gloo"]
AttentionBackend = Literal["auto", "triton", "portable"]
Weights = Literal["auto", "replicated", "mlp", "all"]


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The sharded KV cache."""

    page_tokens: int = 64
    """Tokens per page: a power of two from 16 to 256."""
    kv_memory_bytes: int | None = None
    """KV bytes per rank. None: on a GPU what is free after the model; on the CPU the ranks share at most 4 GiB and at
    most a quarter of free memory."""
    max_context_tokens: int | None = None
    """Longest prompt + completion. None: the model's own limit, or what fits over all ranks if that is less."""
    prefix_cache: bool = True
    """Requests that begin alike share pages, where the model's keys depend on nothing but the tokens before them.
    (Dynamic and longrope position embeddings depend on the prompt's length too: such models are served without.)"""

    def __post_init__(self) -> None:
        if self.page_tokens not in (16, 32, 64, 128, 256):
            raise ConfigError(f"page tokens is {self.page_tokens}; allowed are 16, 32, 64, 128 and 256")
        if self.kv_memory_bytes is not None and self.kv_memory_bytes < 1:
            raise ConfigError(f"KV memory is {self.kv_memory_bytes} bytes; give a size such as 512MiB or 2GiB")
        if self.max_context_tokens is not None and self.max_context_tokens < 2:
            raise ConfigError(f"max context tokens is {self.max_context_tokens}; it must be at least 2")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What one step may hold."""

    max_batch_tokens: int = 2048
    """Tokens in one step, decode rows and prefill chunks together."""
    max_prefill_step_tokens: int | None = None
    """Tokens in a step of prefill chunks alone, as far as the engine finds that it computes them in about a second.
    None: max_batch_tokens."""
    max_sequences: int = 256
    """Sequences that hold pages at once."""
    long_prefill_tokens: int | None = None
    """A prompt with more tokens to compute than this is long: short ones go before it, as far as half of the step,
    and several long ones advance together. None: half of max_batch_tokens."""

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1:
            raise ConfigError(f"max batch tokens is {self.max_batch_tokens}; it must be at least 1")
        if self.longest_step_tokens < self.max_batch_tokens:
            raise ConfigError(
                f"max prefill step tokens is {self.max_prefill_step_tokens}; it must be at least max batch tokens, "
                f"{self.max_batch_tokens}"
            )
        if self.max_sequences < 1:
            raise ConfigError(f"max sequences is {self.max_sequences}; it must be at least 1")
        if self.long_prefill_tokens is not None and self.long_prefill_tokens < 1:
            raise ConfigError(f"long prefill tokens is {self.long_prefill_tokens}; it must be at least 1")

    @property
    def longest_step_tokens(self) -> int:
        """What any step may hold at most."""
        return self.max_batch_tokens if self.max_prefill_step_tokens is None else self.max_prefill_step_tokens


GPU_BATCH = BatchOptions()
CPU_BATCH = BatchOptions(max_batch_tokens=512, max_prefill_step_tokens=2048)
"""Where nobody said otherwise. Running streams wait for each step of somebody's long prompt, and a CPU's steps take
long: there they hold less, and more while no stream runs. (On a GPU a longer step would take memory from the
KV cache; what it gains was never measured.)"""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything the ranks must agree on. It travels as JSON from the process that starts them."""

    model_dir: str
    """A local checkpoint directory; hub ids are resolved before this is made."""
    dtype: DType = "auto"
    """Of weights and KV. auto: float32 on the CPU; on a GPU the checkpoint's own, float32 becoming bfloat16."""
    device: Device = "auto"
    comm: Comm = "auto"
    """auto: NCCL on GPUs, Gloo on the CPU. gloo with --device cuda lets several ranks share one GPU."""
    attention: AttentionBackend = "auto"
    """Also of the operations between a layer's matrix products, unless `fused_kernels` says otherwise."""
    fused_kernels: bool = True
    """Where attention is Triton's, so is what lies between a layer's matrix products, in one launch each. False: in
    PyTorch, to compare."""
    enforce_eager: bool = False
    """Launch every kernel of a decode step anew, and each step when the one before it is done. False: replay CUDA
    graphs, and launch a step while the one before it runs, where the device, the attention and the collectives allow
    it."""
    weights: Weights = "auto"
    """replicated: every rank holds all of them. mlp: MLP and vocabulary are split over the ranks. all: attention
    projections too. auto: whichever makes a decode step shortest, by an estimate."""
    cache: CacheOptions = field(default_factory=CacheOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    step_timeout_s: float = 120.0
    """A rank whose step takes longer, or that is silent for so long, is taken for dead."""

    def __post_init__(self) -> None:
        if not self.step_timeout_s >= 1:
            raise ConfigError(f"step timeout is {self.step_timeout_s:g} s; it must be at least 1 s")
        for name, value, allowed in (
            ("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16")),
            ("device", self.device, ("auto", "cuda", "cpu")),
            ("comm", self.comm, ("auto", "nccl", "gloo")),
            ("attention", self.attention, ("auto", "triton", "portable")),
            ("weights", self.weights, ("auto", "replicated", "mlp", "all")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
        if self.device == "cpu" and self.comm == "nccl":
            raise ConfigError("comm nccl needs GPUs; with --device cpu use gloo or auto")
