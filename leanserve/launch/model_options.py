"""Options of a model and its ranks, as every command that starts, or plans for, one takes them."""

from enum import StrEnum
from typing import Annotated

import typer

from leanserve.contracts.config import CPU_BATCH, GPU_BATCH
from leanserve.contracts.token_counts import parse_tokens

__all__ = [
    "BATCHING",
    "DTYPES",
    "MEMORY",
    "MODEL",
    "RANKS",
    "AttentionChoice",
    "AttentionOption",
    "CommChoice",
    "CommOption",
    "DType",
    "DTypeChoice",
    "DeviceChoice",
    "DeviceOption",
    "EnforceEager",
    "KvMemory",
    "LongPrefillTokens",
    "MaxBatchTokens",
    "MaxContext",
    "MaxSequences",
    "PageTokens",
    "PrefixCache",
    "Ranks",
    "WeightsChoice",
    "WeightsOption",
    "count_or_auto",
    "size_or_auto",
    "tokens_or_auto",
]


class DTypeChoice(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DeviceChoice(StrEnum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class CommChoice(StrEnum):
    auto = "auto"
    nccl = "nccl"
    gloo = "gloo"


class AttentionChoice(StrEnum):
    auto = "auto"
    triton = "triton"
    portable = "portable"


class WeightsChoice(StrEnum):
    auto = "auto"
    replicated = "replicated"
    mlp = "mlp"
    all = "all"


MODEL, RANKS, MEMORY, BATCHING = "Model", "Ranks and devices", "Memory", "Batching"
"""Headings of the help."""
DTYPES = "auto | float32 | bfloat16 | float16"
"""With spaces, where a narrow terminal may break the line."""

Ranks = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Processes that share the KV cache; auto: every usable GPU, else 1.",
        rich_help_panel=RANKS,
    ),
]
DType = Annotated[
    DTypeChoice,
    typer.Option(
        metavar=DTYPES,
        help="Of weights and KV. auto: float32 on the CPU, the checkpoint's own on a GPU.",
        rich_help_panel=MODEL,
    ),
]
DeviceOption = Annotated[DeviceChoice, typer.Option(help="auto: GPUs where usable.", rich_help_panel=RANKS)]
CommOption = Annotated[
    CommChoice,
    typer.Option(
        help="Collectives. auto: NCCL on GPUs, Gloo on the CPU; gloo lets ranks share a GPU.", rich_help_panel=RANKS
    ),
]
AttentionOption = Annotated[
    AttentionChoice, typer.Option(help="auto: Triton on GPUs, portable elsewhere.", rich_help_panel=RANKS)
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="No CUDA graphs, and no step launched before the last is done: a faster start and less memory, slower "
        "decoding. On the CPU it is so anyway.",
        rich_help_panel=RANKS,
    ),
]
WeightsOption = Annotated[
    WeightsChoice,
    typer.Option(
        help="Split over the ranks: none, MLP and vocabulary, or attention projections too. auto: what costs less.",
        rich_help_panel=RANKS,
    ),
]
PageTokens = Annotated[
    int, typer.Option(metavar="N", help="Tokens per KV page: 16, 32, 64, 128 or 256.", rich_help_panel=MEMORY)
]
MaxContext = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Longest prompt + completion, such as 128k. auto: the model's limit, or what fits.",
        rich_help_panel=MEMORY,
    ),
]
KvMemory = Annotated[
    str,
    typer.Option(
        metavar="SIZE|auto", help="KV memory per rank, such as 512MiB. auto: from what is free.", rich_help_panel=MEMORY
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Requests that begin alike share pages, as do the turns of a chat.",
        rich_help_panel=MEMORY,
    ),
]
MaxBatchTokens = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help=f"Tokens computed in one step, decode and prefill together. auto: {GPU_BATCH.max_batch_tokens}; on the "
        f"CPU {CPU_BATCH.max_batch_tokens}, {CPU_BATCH.longest_step_tokens} while no stream runs.",
        rich_help_panel=BATCHING,
    ),
]
MaxSequences = Annotated[int, typer.Option(metavar="N", help="Sequences that run at once.", rich_help_panel=BATCHING)]
LongPrefillTokens = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Longer prompts give way to shorter ones. auto: half of --max-batch-tokens.",
        rich_help_panel=BATCHING,
    ),
]


def count_or_auto(name: str, text: str) -> int | None:
    """None is auto.

    Raises:
        BadParameter: it is neither that nor a whole number.
    """
    if text == "auto":
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither auto nor a whole number", param_hint=name)
    return int(text)


def tokens_or_auto(name: str, text: str) -> int | None:
    """As `count_or_auto`, of a number of tokens such as 128k.

    Raises:
        ConfigError: it is neither.
    """
    return None if text == "auto" else parse_tokens(text, name)


def size_or_auto(text: str) -> str | None:
    """None is auto; whether the rest is a size shows where it is read."""
    return None if text == "auto" else text
