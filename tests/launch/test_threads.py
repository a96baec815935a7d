"""How a rank's threads wait for each other."""

import pytest

from leanserve.launch.threads import spin_briefly


@pytest.mark.parametrize(
    ("said", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(said, then):
    environment = dict(said)
    spin_briefly(environment)
    assert environment == then
