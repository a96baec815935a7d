"""A deployment and what it would hold and cost: every figure of `leanserve plan`, as values."""

from dataclasses import dataclass, field
from pathlib import Path

from leanserve.contracts.config import BatchOptions
from leanserve.contracts.errors import ConfigError
from leanserve.model.activations import activation_bytes
from leanserve.model.architecture import Architecture, read_architecture
from leanserve.model.checkpoint import resolve_config
from leanserve.model.partition import WEIGHT_SPLITS, Partition, WeightSplit
from leanserve.planner.gpus import Gpu
from leanserve.planner.roofline import Constants, DecodeTime, PrefillTime, decode_time, prefill_time

__all__ = ["Deployment", "Memory", "Plan", "Question", "find_architecture", "make_plan"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked for."""

    gpu: Gpu
    ranks: int
    context_tokens: int
    """Of each sequence."""
    sequences: int
    """At once."""
    dtype: str = "bfloat16"
    page_tokens: int = 64
    kv_bytes_per_rank: int | None = None
    """As `--kv-memory`; None: what the GPU has left."""
    batch: BatchOptions = field(default_factory=BatchOptions)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype is {self.dtype!r}; allowed are {', '.join(DTYPE_BYTES)}")
        for name in ("ranks", "context_tokens", "sequences", "page_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be at least 1")
        if self.ranks > 1024:
            raise ConfigError(f"ranks is {self.ranks}; it must be at most 1024")


@dataclass(frozen=True)
class Memory:
    """Of one rank, the one that holds the most weights, in bytes."""

    weights: int
    activations: int
    kv_bytes_per_token: int
    """Of a token that this rank owns."""
    pages: int
    """0: the weights alone do not fit."""
    page_tokens: int

    @property
    def kv_bytes(self) -> int:
        return self.pages * self.page_tokens * self.kv_bytes_per_token


@dataclass(frozen=True)
class Deployment:
    """A number of ranks with one way to split the weights."""

    ranks: int
    split: WeightSplit
    memory: Memory
    cache_tokens: int
    """That all ranks hold together."""
    longest_context_tokens: int
    """Of one sequence alone, no longer than the model's own limit."""
    sequences: int
    """Of the asked length that fit at once."""
    decode: DecodeTime
    prefill: PrefillTime

    @property
    def fits(self) -> bool:
        return self.memory.pages > 0


@dataclass(frozen=True)
class Plan:
    """The asked rank count with every split, and the best split for other rank counts."""

    architecture: Architecture
    question: Question
    constants: Constants
    asked: tuple[Deployment, ...]
    """One for each of `WEIGHT_SPLITS`; replicated alone on one rank, or on more than the vocabulary has tokens."""
    by_ranks: tuple[Deployment, ...]
    """For 1, 2, 4, ... up to the asked number of ranks: the split that fits and decodes fastest."""


def find_architecture(model: str | Path) -> Architecture:
    """Of a directory with a config.json, or of a hub id; weights are neither needed nor fetched."""
    return read_architecture(resolve_config(model))


def make_plan(architecture: Architecture, question: Question, constants: Constants) -> Plan:
    """Work out the asked deployment, and smaller ones beside it.

    Raises:
        ConfigError: the context is longer than the model allows.
    """
    if question.context_tokens > architecture.max_context_tokens:
        raise ConfigError(
            f"a context of {question.context_tokens:,} tokens is asked for, but the model's own limit is "
            f"{architecture.max_context_tokens:,}"
        )
    counts = sorted({1 << power for power in range(question.ranks.bit_length())} | {question.ranks})
    by_ranks = []
    for ranks in counts:
        deployments = _with_every_split(architecture, question, constants, ranks)
        able = [deployment for deployment in deployments if deployment.sequences >= question.sequences]
        fitting = able or [deployment for deployment in deployments if deployment.fits] or deployments
        by_ranks.append(min(fitting, key=lambda deployment: deployment.decode.total_ms))
    asked = _with_every_split(architecture, question, constants, question.ranks)
    return Plan(architecture, question, constants, asked, tuple(by_ranks))


def _with_every_split(
    architecture: Architecture, question: Question, constants: Constants, ranks: int
) -> tuple[Deployment, ...]:
    splits = WEIGHT_SPLITS if 1 < ranks <= architecture.vocab_size else WEIGHT_SPLITS[:1]
    return tuple(_deployment(Partition(architecture, split, 0, ranks), question, constants) for split in splits)


def _deployment(partition: Partition, question: Question, constants: Constants) -> Deployment:
    dtype_bytes = DTYPE_BYTES[question.dtype]
    memory = _memory(partition, question, constants)
    pages = partition.size * memory.pages
    cache_tokens = pages * question.page_tokens
    return Deployment(
        ranks=partition.size,
        split=partition.split,
        memory=memory,
        cache_tokens=cache_tokens,
        longest_context_tokens=min(cache_tokens, partition.architecture.max_context_tokens),
        sequences=pages // -(-question.context_tokens // question.page_tokens),
        decode=decode_time(
            partition, question.gpu, constants,
            dtype_bytes=dtype_bytes, context_tokens=question.context_tokens, sequences=question.sequences,
        ),
        prefill=prefill_time(
            partition, question.gpu, constants,
            dtype_bytes=dtype_bytes, prompt_tokens=question.context_tokens,
        ),
    )  # fmt: skip


def _memory(partition: Partition, question: Question, constants: Constants) -> Memory:
    architecture, dtype_bytes = partition.architecture, DTYPE_BYTES[question.dtype]
    weights = partition.num_parameters * dtype_bytes
    activations = activation_bytes(
        architecture, question.batch, dtype_bytes, page_tokens=question.page_tokens, captures_graphs=True
    )
    kv_bytes_per_token = architecture.kv_bytes_per_token(dtype_bytes)
    budget = question.kv_bytes_per_rank
    if budget is None:
        budget = int(question.gpu.memory_bytes * constants.memory_share - weights - activations)
    pages = max(budget, 0) // (kv_bytes_per_token * question.page_tokens)
    return Memory(weights, activations, kv_bytes_per_token, pages, question.page_tokens)
