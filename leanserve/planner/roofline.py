"""Time from bytes and operations: what a step cannot be faster than, times how close to it kernels come.

Decode is the time to read weights and keys, plus collectives. Prefill is the time of its multiplications, plus what
crosses between ranks. Estimates: what no machine has measured is marked as assumed, and `--calibrate` replaces it.
"""

import json
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path

from leanserve.contracts.errors import ConfigError
from leanserve.model.partition import Partition
from leanserve.planner.gpus import Gpu

__all__ = ["Constants", "DecodeTime", "PrefillTime", "decode_time", "prefill_time"]

STATE_BYTES = 4
"""Partial attention states are float32 whatever the model is."""


@dataclass(frozen=True)
class Constants:
    """How close to the peaks a machine comes, and what a call costs."""

    bandwidth_share: float = 0.85
    """Of the memory's peak bandwidth, when weights or keys are read. Assumed: what the kernels aim at."""
    flops_share: float = 0.5
    """Of the peak FLOP/s, in prefill. Assumed."""
    link_share: float = 0.7
    """Of the link's peak bandwidth, in large collectives. Assumed."""
    collective_us: float = 18.0
    """A small collective: 16 to 20 us were seen with NCCL inside a CUDA graph."""
    layer_us: float = 12.0
    """A layer's kernels in a CUDA graph beside the reads: launches, and tails of uneven work. Assumed."""
    memory_share: float = 0.90
    """Of a GPU's memory, what weights, activations and KV may take together: the server's own rule."""

    @classmethod
    def calibrated(cls, path: Path) -> "Constants":
        """The defaults with what a JSON file measured: `{"bandwidth_share": 0.91, ...}`.

        Raises:
            ConfigError: the file cannot be read, or holds a name or a value that cannot be.
        """
        names = [field.name for field in fields(cls)]
        try:
            measured = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(measured, dict):
            raise ConfigError(f"{path} holds {type(measured).__name__}; it must be an object with {', '.join(names)}")
        for name, value in measured.items():
            if name not in names:
                raise ConfigError(f"{path} sets {name!r}; allowed are {', '.join(names)}")
            highest = 1.0 if name.endswith("_share") else 1e6
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= highest:
                raise ConfigError(f"{path} sets {name} to {value!r}; it must be above 0 and at most {highest:g}")
        return replace(cls(), **measured)


@dataclass(frozen=True)
class DecodeTime:
    """Milliseconds of one decode step, by what takes them."""

    weights_ms: float
    kv_ms: float
    collectives_ms: float
    kernels_ms: float

    @property
    def total_ms(self) -> float:
        return self.weights_ms + self.kv_ms + self.collectives_ms + self.kernels_ms


@dataclass(frozen=True)
class PrefillTime:
    """Seconds of one prompt's prefill, by what takes them."""

    linear_s: float
    attention_s: float
    wire_s: float

    @property
    def total_s(self) -> float:
        return self.linear_s + self.attention_s + self.wire_s


def decode_time(
    partition: Partition,
    gpu: Gpu,
    constants: Constants,
    *,
    dtype_bytes: int,
    context_tokens: int,
    sequences: int,
) -> DecodeTime:
    """One token for each of `sequences` contexts, at the rank that holds the most weights.

    Reads happen once a step, whatever the number of sequences.
    """
    a, ranks = partition.architecture, partition.size
    seconds_per_byte = 1 / (gpu.bandwidth * constants.bandwidth_share)
    seen_tokens = sum(min(context_tokens, window or context_tokens) for window in a.layer_windows)
    kv_bytes = sequences * seen_tokens * 2 * a.num_kv_heads * a.head_dim * dtype_bytes / ranks
    calls = a.num_layers + 1 + partition.collectives  # beside the weights': attention's states, and the step's tokens
    wire_bytes = _decode_wire_bytes(partition, dtype_bytes=dtype_bytes, sequences=sequences)
    link_s = wire_bytes * (ranks - 1) / (gpu.link * constants.link_share)
    return DecodeTime(
        weights_ms=partition.parameters_read * dtype_bytes * seconds_per_byte * 1e3,
        kv_ms=kv_bytes * seconds_per_byte * 1e3,
        collectives_ms=0.0 if ranks == 1 else calls * constants.collective_us / 1e3 + link_s * 1e3,
        kernels_ms=a.num_layers * constants.layer_us / 1e3,
    )


def _decode_wire_bytes(partition: Partition, *, dtype_bytes: int, sequences: int) -> int:
    """What each rank sends to each other rank in a step."""
    a = partition.architecture
    states = a.num_heads * (a.head_dim + 1) * STATE_BYTES
    return sequences * a.num_layers * (states + _gathered_bytes(partition, dtype_bytes))


def _gathered_bytes(partition: Partition, dtype_bytes: int) -> int:
    """Of one token in one layer, what the collectives of split weights carry."""
    a = partition.architecture
    mlp = 2 * a.hidden_size if partition.splits_mlp else 0
    attention = 2 * a.hidden_size + (a.num_heads + 2 * a.num_kv_heads) * a.head_dim if partition.splits_attention else 0
    return (mlp + attention) * dtype_bytes


def prefill_time(
    partition: Partition,
    gpu: Gpu,
    constants: Constants,
    *,
    dtype_bytes: int,
    prompt_tokens: int,
) -> PrefillTime:
    """One prompt without anything cached. Every rank computes an equal part of it."""
    a, ranks = partition.architecture, partition.size
    rate = ranks * gpu.flops * constants.flops_share
    projections = sum(prod(shape) for name, shape in a.tensor_shapes().items() if "_proj." in name)
    pairs = sum(_query_key_pairs(prompt_tokens, window) for window in a.layer_windows)
    queries = a.num_heads * a.head_dim * dtype_bytes
    states = a.num_heads * (a.head_dim + 1) * STATE_BYTES
    foreign_tokens = prompt_tokens * (ranks - 1) / ranks
    wire_bytes = a.num_layers * foreign_tokens * (queries + states + _gathered_bytes(partition, dtype_bytes))
    return PrefillTime(
        linear_s=2 * projections * prompt_tokens / rate,
        attention_s=4 * pairs * a.num_heads * a.head_dim / rate,
        wire_s=wire_bytes / (gpu.link * constants.link_share),
    )


def _query_key_pairs(tokens: int, window: int | None) -> float:
    """How many keys all queries of a prompt see together."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window
