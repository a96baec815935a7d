"""A rank of `leanserve doctor`: meets the others as a serving rank does, and times all-gathers instead of serving.

Run by `RanksProcess`. Rank 0 finds its orders in the run directory, and leaves what it measured there.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import msgspec
import torch

from leanserve.contracts.errors import EngineError, LeanServeError
from leanserve.distributed.ranks import Ranks
from leanserve.launch.doctor_facts import TRIAL_FILE, TRIAL_ORDERS_FILE, GatherTime, Trial, TrialOrders
from leanserve.launch.lifeline import when_gone
from leanserve.launch.meeting import Orders, compare_cards, convene, exchange_cards, join, reach_agent
from leanserve.launch.place import Place
from leanserve.launch.run_dir import RUN_DIR_VARIABLE
from leanserve.worker.device import choose_comm, choose_device, describe

__all__ = ["main"]

TIMEOUT_S = 60.0
WARM_UPS, RUNS = 5, 50
SIZES = (1 << 10, 16 << 10, 256 << 10, 4 << 20)
"""Bytes that each rank gives. A decode step of one sequence is in the tens of KiB per layer, one of many in the MiB."""


def main() -> None:
    began = time.perf_counter()
    place = Place.from_environment()
    when_gone(place.agent_pid, lambda: os._exit(1))
    try:
        _run(place, began)
    except (LeanServeError, RuntimeError) as error:  # torch's own errors are RuntimeErrors
        sys.exit(f"rank {place.rank}: {type(error).__name__}: {error}")


def _run(place: Place, began: float) -> None:
    agent_store, host = reach_agent(place, TIMEOUT_S)
    run_dir = Path(os.environ[RUN_DIR_VARIABLE])
    if place.rank == 0:
        told = msgspec.json.decode((run_dir / TRIAL_ORDERS_FILE).read_bytes(), type=TrialOrders)
        orders = Orders(
            config=told.config,
            host=place.host,
            run_dir=str(run_dir),
            front_end_pid=told.front_end_pid,
            pulse_address="",
        )
        store = convene(agent_store, host, orders, TIMEOUT_S)
    else:
        store, orders = join(agent_store, TIMEOUT_S)
    when_gone(orders.front_end_pid, lambda: os._exit(1))
    compare_cards(exchange_cards(store, place, Path(orders.config.model_dir)))
    config = orders.config
    device = choose_device(config.device, place.local_rank, place.local_size, shares_gpu=config.comm == "gloo")
    backend = choose_comm(config.comm, device)
    ranks = Ranks.join(
        rank=place.rank, size=place.size, store=store, backend=backend, device=device, timeout_s=TIMEOUT_S
    )
    ranks.gather_ints(place.rank)
    met_s = time.perf_counter() - began
    gathers = [_time_gathers(ranks, num_bytes) for num_bytes in SIZES] if ranks.size > 1 else []
    if place.rank == 0:
        trial = Trial(ranks.size, backend, describe(device), met_s, gathers)
        (run_dir / TRIAL_FILE).write_bytes(msgspec.json.encode(trial))
    ranks.leave()


def _time_gathers(ranks: Ranks, num_bytes: int) -> GatherTime:
    """Raises: EngineError where what arrives is not what was sent."""
    mine = torch.full((num_bytes // 4,), ranks.rank + 1, dtype=torch.float32, device=ranks.device)
    seconds: list[float] = []
    everybody = mine
    for _ in range(WARM_UPS + RUNS):
        started = time.perf_counter()
        everybody = ranks.all_gather(mine)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        seconds.append(time.perf_counter() - started)
    for rank in range(ranks.size):
        if not bool((everybody[rank] == rank + 1).all()):
            raise EngineError(f"an all-gather of {num_bytes} bytes brought other bytes than rank {rank} sent")
    measured = seconds[WARM_UPS:]
    return GatherTime(num_bytes, 1e6 * statistics.median(measured), 1e6 * max(measured))


if __name__ == "__main__":
    main()
