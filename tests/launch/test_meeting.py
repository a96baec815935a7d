"""Ranks compare what they run before they begin, and a difference names the rank."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch.distributed as dist

from checkpoints import checkpoint
from leanserve.contracts.errors import ConfigError
from leanserve.launch.meeting import Card, compare_cards, exchange_cards
from leanserve.launch.place import Place

FAULTS = str(Path(__file__).with_name("faults"))
CARD = Card(rank=0, pid=1, host="alpha", agent_pid=1, leanserve="1.0", torch="2.13", model="abc")
PLACE = Place(rank=0, size=3, local_rank=0, local_size=3, agent_pid=1, host="alpha")


@pytest.mark.parametrize(("field", "name"), [("leanserve", "leanserve"), ("torch", "torch"), ("model", "the model")])
def test_what_differs_is_named_with_both_values(field, name) -> None:
    others = [msgspec.structs.replace(CARD, rank=rank, host="beta") for rank in (1, 2)]
    compare_cards([CARD, *others])
    others[1] = msgspec.structs.replace(others[1], **{field: "other"})
    with pytest.raises(
        ConfigError, match=f"rank 2 on beta has {name} other, rank 0 on alpha has {getattr(CARD, field)};"
    ):
        compare_cards([CARD, *others])


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", '{"changed": 1}'), ("model.safetensors", "shorter"), ("more.safetensors", "another file")],
)
def test_another_checkpoint_under_the_same_path_is_found(tmp_path_factory, tmp_path, file, content) -> None:
    ours = checkpoint(tmp_path_factory, "llama")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in ours.iterdir():
        (theirs / path.name).write_bytes(path.read_bytes())
    assert meet([ours, theirs, ours]) == ["", "", ""]
    (theirs / file).write_text(content)
    messages = meet([ours, theirs, ours])
    assert len(set(messages)) == 1
    assert "rank 1 on alpha has the model " in messages[0]


def meet(model_dirs: list[Path]) -> list[str]:
    """What each rank says of the others' cards."""
    store = dist.HashStore()

    def one(rank: int) -> str:
        try:
            compare_cards(exchange_cards(store, replace(PLACE, rank=rank), model_dirs[rank]))
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(model_dirs)) as pool:
        return list(pool.map(one, range(len(model_dirs))))


def test_a_server_with_a_rank_of_another_version_ends_and_says_which() -> None:
    path = os.pathsep.join([FAULTS, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "leanserve", "serve", "--ranks", "2", "--device", "cpu", "--port", "0"]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path, "FAULT_OTHER_VERSION": "1", "COLUMNS": "200"},
    )
    assert ended.returncode == 1
    [said] = [line for line in ended.stderr.splitlines() if "has leanserve 0.0.0" in line]  # by two ranks, told once
    assert " ERROR " in said
    assert "the server ends: rank " in said
    assert "rank 1 on " in said
