"""How many pages fit."""

import pytest
import torch

from leanserve.contracts.errors import ConfigError
from leanserve.worker.memory import CPU_KV_LIMIT_BYTES, available_host_bytes, kv_budget_bytes, num_pages


def budget(wanted: int | None, ranks: int) -> int:
    return kv_budget_bytes(wanted, torch.device("cpu"), ranks_on_host=ranks, ranks_on_device=1, activation_bytes=0)


def test_the_users_word_is_taken_as_it_is():
    assert budget(12345, ranks=4) == 12345


def test_ranks_of_one_host_share_its_memory():
    free = available_host_bytes()
    for ranks in (1, 2, 3):
        assert 0 < budget(None, ranks) <= CPU_KV_LIMIT_BYTES // ranks
        assert budget(None, ranks) <= 0.26 * free / ranks + 2**28  # free memory moves while this runs


def test_a_cgroup_that_is_full_of_files_has_room(tmp_path):
    """16 MiB allowed, all of them held: 9 by a checkpoint that was read, 6 by programs, 1 by what cannot go."""
    for name, text in {
        "memory.max": f"{16 << 20}\n",
        "memory.current": f"{16 << 20}\n",
        "memory.stat": f"anon {6 << 20}\nfile {10 << 20}\ninactive_file {8 << 20}\nactive_file {1 << 20}\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert available_host_bytes(tmp_path) == 9 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_bytes(tmp_path) > 9 << 20


def test_pages_are_whole_and_at_least_one():
    assert num_pages(1000, 300, 16) == 3
    with pytest.raises(ConfigError, match="raise --kv-memory, lower --page-tokens, or use more ranks"):
        num_pages(299, 300, 16)
    with pytest.raises(ConfigError):
        num_pages(-5, 300, 16)
