"""What `serve`, `generate`, `bench` and `LLM` have in common: a model, the ranks, and the engine's options."""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from leanserve.bundled import bundled_model_dir
from leanserve.contracts.config import (
    CPU_BATCH,
    GPU_BATCH,
    AttentionBackend,
    BatchOptions,
    CacheOptions,
    Comm,
    Device,
    DType,
    EngineConfig,
    Weights,
)
from leanserve.contracts.errors import ConfigError
from leanserve.launch.ranks_process import count_gpus
from leanserve.model.checkpoint import resolve_model

__all__ = ["LaunchOptions", "parse_bytes"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str | int) -> int:
    """`"512MiB"`, `"2GB"`, `"1.5GiB"` or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{text!r} is no size; write a number of bytes, or one with KiB, MiB, GiB, KB, MB or GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Options as users write them, on the command line or as keywords of `LLM`."""

    model: str | None = None
    """A checkpoint directory or a hub id; None is the bundled model."""
    ranks: int | None = None
    """Ranks on this machine; None: every usable GPU, else one on the CPU."""
    dtype: DType = "auto"
    device: Device = "auto"
    comm: Comm = "auto"
    attention: AttentionBackend = "auto"
    enforce_eager: bool = False
    """No CUDA graphs, and no step that is launched before the last is done."""
    weights: Weights = "auto"
    """Which weights are split over the ranks."""
    page_tokens: int = 64
    kv_memory: str | int | None = None
    """KV memory of each rank, such as 512MiB."""
    max_context_tokens: int | None = None
    prefix_cache: bool = True
    """Requests that begin alike share pages."""
    max_batch_tokens: int | None = None
    """Tokens in one step; None: what suits GPUs, or the CPU where none is used: there a step holds more while no stream
    runs."""
    max_sequences: int = 256
    long_prefill_tokens: int | None = None
    """Longer prompts give way to shorter ones; None: half of max_batch_tokens."""
    step_timeout_s: float = 120.0
    """A rank whose step takes longer, or that is silent for so long, is taken for dead."""

    def __post_init__(self) -> None:
        if self.ranks is not None and not 1 <= self.ranks <= 1024:
            raise ConfigError(f"ranks is {self.ranks}; it must be from 1 to 1024, or auto")

    def find_model(self) -> Path:
        """The checkpoint's directory, downloaded if need be."""
        return bundled_model_dir() if self.model is None else resolve_model(self.model)

    def count_ranks(self) -> tuple[int, str | None]:
        """How many ranks to start, and what the user should know about a GPU that stays unused."""
        if self.ranks is not None and self.device == "cpu":
            return self.ranks, None
        gpus, reason = self._gpus
        return self.ranks or max(gpus, 1), reason if gpus == 0 else None

    @cached_property
    def _gpus(self) -> tuple[int, str | None]:
        return count_gpus(self.device)

    @property
    def _batch(self) -> BatchOptions:
        if self.max_batch_tokens is not None:
            steps = BatchOptions(max_batch_tokens=self.max_batch_tokens)
        else:
            steps = GPU_BATCH if self._gpus[0] else CPU_BATCH
        return replace(steps, max_sequences=self.max_sequences, long_prefill_tokens=self.long_prefill_tokens)

    def engine_config(self, model_dir: Path) -> EngineConfig:
        """What the ranks must agree on. Looks for GPUs, unless the options leave nothing open."""
        return EngineConfig(
            model_dir=str(model_dir),
            dtype=self.dtype,
            device=self.device,
            comm=self.comm,
            attention=self.attention,
            enforce_eager=self.enforce_eager,
            weights=self.weights,
            cache=CacheOptions(
                page_tokens=self.page_tokens,
                kv_memory_bytes=None if self.kv_memory is None else parse_bytes(self.kv_memory),
                max_context_tokens=self.max_context_tokens,
                prefix_cache=self.prefix_cache,
            ),
            batch=self._batch,
            step_timeout_s=self.step_timeout_s,
        )
