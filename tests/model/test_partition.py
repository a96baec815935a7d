"""Which part of every weight a rank holds: all ranks' parts together are the model, once."""

from dataclasses import replace

import pytest
import torch

from checkpoints import FAMILIES, checkpoint
from leanserve.contracts.errors import ConfigError
from leanserve.model.architecture import Architecture, read_architecture
from leanserve.model.partition import WEIGHT_SPLITS, Partition, WeightSplit, even_shares
from leanserve.model.split_choice import CPU_COSTS, GPU_COSTS, SplitChoice, choose_split, describe_split

H200_BYTES = 141 * 10**9


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("extent", [0, 1, 2, 5, 101, 1000, 4096, 14336, 128256])
def test_shares_are_even_and_in_order(extent: int, size: int) -> None:
    shares = even_shares(extent, size)
    assert [i for share in shares for i in share] == list(range(extent))
    lengths = [len(share) for share in shares]
    assert len(lengths) == size
    long = extent >= 64 * size
    assert max(lengths) - min(lengths) <= (8 + 7 if long else 1), "one unit of 8, and what the last is short of"
    assert max(lengths) == lengths[0], "rank 0 holds the most"
    if long:
        assert all(share.start % 8 == 0 for share in shares), "rows of a share begin on 16 bytes"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("split", WEIGHT_SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_all_ranks_are_the_model(
    tmp_path_factory: pytest.TempPathFactory, family: str, split: WeightSplit, size: int
) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family in ("llama", "smollm3") else {}
    architecture = read_architecture(checkpoint(tmp_path_factory, family, heads=5, kv_heads=5, hidden=35, **biases))
    parts = [Partition(architecture, split, rank, size).tensor_parts() for rank in range(size)]
    for name, shape in architecture.tensor_shapes().items():
        holders = torch.zeros(shape, dtype=torch.int)
        for part in parts:
            if name in part:
                holders[tuple(slice(extent.start, extent.stop) for extent in part[name])] += 1
        matrix, *_ = [word for word in name.split(".") if word.endswith(("proj", "tokens", "head"))] or [""]
        in_mlp = matrix in ("gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
        is_split = matrix != "" and (split == "all" or (split == "mlp" and in_mlp))
        assert (holders == (1 if is_split else size)).all(), name


def test_num_parameters_counts_what_is_held(tmp_path_factory: pytest.TempPathFactory) -> None:
    architecture = read_architecture(checkpoint(tmp_path_factory, "qwen2"))
    whole = architecture.num_parameters
    assert [Partition(architecture, "replicated", rank, 3).num_parameters for rank in range(3)] == [whole] * 3
    held = [Partition(architecture, "all", rank, 3).num_parameters for rank in range(3)]
    assert whole / 3 < held[0] < 1.1 * whole / 3
    assert held[0] >= held[1] >= held[2]
    assert Partition(architecture, "all", 0, 1).num_parameters == whole


def test_a_vocabulary_smaller_than_the_ranks_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny = replace(read_architecture(checkpoint(tmp_path_factory, "llama")), vocab_size=3)
    Partition(tiny, "mlp", 0, 3)
    Partition(tiny, "replicated", 0, 4)
    with pytest.raises(ConfigError, match="--weights mlp: a vocabulary of 3 tokens cannot be split over 4 ranks"):
        Partition(tiny, "mlp", 0, 4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(checkpoint(tmp_path_factory, "llama"))


def shaped(small: Architecture, hidden: int, middle: int, layers: int, heads: int, vocab: int, *, tied: bool = False):
    """A published model's sizes, with head_dim 128."""
    return replace(
        small, hidden_size=hidden, intermediate_size=middle, num_layers=layers, num_heads=heads, head_dim=128,
        num_kv_heads=min(heads, 8), vocab_size=vocab, tied_embeddings=tied, layer_windows=(None,) * layers,
    )  # fmt: skip


def choice(architecture: Architecture, ranks: int, memory_bytes: int = H200_BYTES) -> SplitChoice:
    return choose_split(
        architecture, ranks=ranks, ranks_per_memory=1, dtype_bytes=2, costs=GPU_COSTS, memory_bytes=memory_bytes
    )


def test_auto_on_gpus(small: Architecture) -> None:
    """The sizes that the design argues with, in bfloat16."""
    of_1_5b = shaped(small, 1536, 8960, 28, 12, 151936, tied=True)
    of_8b = shaped(small, 4096, 14336, 32, 32, 128256)
    of_70b = shaped(small, 8192, 28672, 80, 64, 128256)
    assert [choice(of_1_5b, ranks).split for ranks in (1, 2, 8)] == ["replicated"] * 3
    assert [choice(of_8b, ranks).split for ranks in (1, 2, 8)] == ["replicated", "mlp", "mlp"]
    assert choice(of_70b, 8).split == "all"
    assert "3.1 ms replicated" in choice(of_8b, 2).reason


def test_auto_leaves_memory_to_the_cache(small: Architecture) -> None:
    of_1_5b = shaped(small, 1536, 8960, 28, 12, 151936, tied=True)
    tight = choice(of_1_5b, 2, memory_bytes=4 * 10**9)
    assert tight.split == "mlp"
    assert "replicated would leave less than half of the memory to the KV cache" in tight.reason
    assert choice(of_1_5b, 2, memory_bytes=10**9).split == "all"


def test_auto_splits_no_vocabulary_of_fewer_tokens_than_ranks(small: Architecture) -> None:
    tiny = shaped(small, 64, 128, 2, 4, 3)
    assert choice(tiny, 3).split in ("replicated", "mlp", "all")
    assert choice(tiny, 4) == SplitChoice("replicated", "3 tokens cannot be split over 4 ranks")


def test_auto_on_a_cpu(small: Architecture) -> None:
    def on_cpu(architecture: Architecture) -> str:
        return choose_split(
            architecture, ranks=2, ranks_per_memory=2, dtype_bytes=4, costs=CPU_COSTS, memory_bytes=8 * 10**9
        ).split

    assert on_cpu(small) == "replicated"
    assert on_cpu(shaped(small, 1024, 3072, 8, 16, 32000)) != "replicated"


def test_the_banner_says_what_a_rank_holds(small: Architecture) -> None:
    of_8b = shaped(small, 4096, 14336, 32, 32, 128256)
    assert describe_split(Partition(of_8b, "replicated", 0, 2), 2, "") == "replicated, 14.96 GiB on each rank"
    assert describe_split(Partition(of_8b, "mlp", 0, 1), 2, "") == "replicated, 14.96 GiB on each rank"
    text = describe_split(Partition(of_8b, "mlp", 0, 2), 2, "because")
    assert text == "MLP and vocabulary split over the ranks, 8.73 of 14.96 GiB on each (auto: because)"
