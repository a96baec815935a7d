"""How many pages fit."""

import pytest
import torch

from leanserve.contracts.errors import ConfigError
from leanserve.worker.host_memory import available_host_bytes
from leanserve.worker.memory import CPU_KV_LIMIT_BYTES, kv_budget_bytes, num_pages


def budget(wanted: int | None, ranks: int) -> int:
    return kv_budget_bytes(wanted, torch.device("cpu"), ranks_on_host=ranks, ranks_on_device=1, activation_bytes=0)


def test_the_users_word_is_taken_as_it_is():
    assert budget(12345, ranks=4) == 12345


def test_ranks_of_one_host_share_its_memory():
    free = available_host_bytes()
    for ranks in (1, 2, 3):
        assert 0 < budget(None, ranks) <= CPU_KV_LIMIT_BYTES // ranks
        assert budget(None, ranks) <= 0.26 * free / ranks + 2**28  # free memory moves while this runs


def test_pages_are_whole_and_at_least_one():
    assert num_pages(1000, 300, 16) == 3
    with pytest.raises(ConfigError, match="raise --kv-memory, lower --page-tokens, or use more ranks"):
        num_pages(299, 300, 16)
    with pytest.raises(ConfigError):
        num_pages(-5, 300, 16)
