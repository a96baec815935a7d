"""The systems that a benchmark compares: LeanServe on each number of ranks, and its peer."""

from collections.abc import Sequence
from pathlib import Path

from leanserve.bench.leanserve_ranks import run_rank
from leanserve.bench.report import PEER
from leanserve.bench.system import System
from leanserve.bench.transformers_peer import run_transformers

__all__ = ["line_up"]


def line_up(ranks: Sequence[int], threads: int, model_dir: Path, folder: Path) -> list[System]:
    """The systems, the peer last; none is started.

    Args:
        ranks: LeanServe's numbers of ranks.
        threads: of each system in all.
        folder: where ranks meet.
    """
    systems: list[System] = []
    for size in ranks:
        meeting_place = folder / f"ranks-{size}"
        meeting_place.mkdir()
        name = f"leanserve {size} rank" + ("s" if size > 1 else "")
        systems.append(System(name, size, run_rank, size, max(1, threads // size), model_dir, meeting_place))
    return [*systems, System(PEER, 1, run_transformers, threads, model_dir)]
