"""Which weights to split over the ranks, by an estimate of a decode step. No torch here.

At long contexts it is decode that users wait for, and a decode step reads every weight that a rank holds. Splitting
makes that less and adds collectives: one a layer for the MLP, two more for the attention projections.
"""

from dataclasses import dataclass

from leanserve.model.architecture import Architecture
from leanserve.model.partition import WEIGHT_SPLITS, Partition, WeightSplit

__all__ = ["CPU_COSTS", "GPU_COSTS", "SplitChoice", "StepCosts", "choose_split", "describe_split"]

_WEIGHTS_SHARE = 0.5
"""Of a rank's memory, what weights may take while a smaller split would leave more of it to the KV cache."""


@dataclass(frozen=True)
class StepCosts:
    """What a kind of device takes."""

    read_bytes_per_s: float
    """Weights from memory."""
    collective_s: float
    """A small collective, from the call to the result."""


GPU_COSTS = StepCosts(read_bytes_per_s=4.8e12, collective_s=18e-6)
"""NVIDIA H200: its memory's bandwidth (data sheet), and the middle of the 16 to 20 us that NCCL takes in a CUDA graph.
On a GPU with slower memory, splitting pays sooner than estimated."""
CPU_COSTS = StepCosts(read_bytes_per_s=14e9, collective_s=0.4e-3)
"""2 cores of an AMD EPYC: what a decode step of `bench engine` reads of weights (22 steps/s over 0.63 GB, float32, see
bench/results), and an all-gather between 2 ranks with Gloo over loopback."""


@dataclass(frozen=True)
class SplitChoice:
    """What was chosen."""

    split: WeightSplit
    reason: str
    """For people, after a colon."""


def choose_split(
    architecture: Architecture,
    *,
    ranks: int,
    ranks_per_memory: int,
    dtype_bytes: int,
    costs: StepCosts,
    memory_bytes: int,
) -> SplitChoice:
    """The split with the shortest decode step, of those that leave half of the memory to the KV cache.

    Args:
        ranks: the weights may be split over so many.
        ranks_per_memory: so many read through one memory at a time: all of a CPU's, usually one of a GPU's.
        dtype_bytes: of a weight.
        memory_bytes: a rank's, for weights and KV.
    """
    if ranks == 1:
        return SplitChoice("replicated", "one rank holds everything")
    if architecture.vocab_size < ranks:
        return SplitChoice("replicated", f"{architecture.vocab_size} tokens cannot be split over {ranks} ranks")
    parts: dict[WeightSplit, Partition] = {  # of rank 0, which holds the most
        split: Partition(architecture, split, 0, ranks) for split in WEIGHT_SPLITS
    }

    step_s = {split: _step_s(part, costs, dtype_bytes * ranks_per_memory) for split, part in parts.items()}
    times = ", ".join(f"{seconds * 1e3:.1f} ms {split}" for split, seconds in step_s.items())
    estimate = f"a decode step's weights and their collectives take an estimated {times}"
    room = _WEIGHTS_SHARE * memory_bytes
    fitting: list[WeightSplit] = [split for split, part in parts.items() if part.num_parameters * dtype_bytes <= room]
    if not fitting:
        return SplitChoice("all", "even so, weights take more than half of each rank's memory")
    if left_out := [split for split in WEIGHT_SPLITS if split not in fitting]:
        estimate += f"; {' and '.join(left_out)} would leave less than half of the memory to the KV cache"
    return SplitChoice(min(fitting, key=lambda split: step_s[split]), estimate)


def describe_split(partition: Partition, dtype_bytes: int, reason: str) -> str:
    """One line for people.

    Args:
        partition: of rank 0, which holds the most.
        reason: why it is so; empty where the user asked for it.
    """
    mine_gib = partition.num_parameters * dtype_bytes / 2**30
    whole_gib = partition.architecture.num_parameters * dtype_bytes / 2**30
    if not partition.splits_mlp:
        text = f"replicated, {whole_gib:.2f} GiB on each rank"
    else:
        what = "all matrices" if partition.splits_attention else "MLP and vocabulary"
        text = f"{what} split over the ranks, {mine_gib:.2f} of {whole_gib:.2f} GiB on each"
    return f"{text} (auto: {reason})" if reason else text


def _step_s(partition: Partition, costs: StepCosts, read_bytes: int) -> float:
    """`read_bytes` from memory for each weight that one rank reads."""
    read_s = partition.parameters_read * read_bytes / costs.read_bytes_per_s
    return read_s + partition.collectives * costs.collective_s
