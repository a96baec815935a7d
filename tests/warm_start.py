"""Child processes that begin at once: copies of one process that has imported what takes seconds to import."""

import multiprocessing
import sys
from typing import Literal

__all__ = ["warm_start_method"]

IMPORTED = ["__main__", "leanserve.launch.rank", "leanserve.launch.front_end"]


def warm_start_method() -> Literal["forkserver", "spawn"]:
    """For multiprocessing, torch's too. The first call of a session fixes the environment of all later children.

    Not for children that use CUDA or import Triton under other variables than this process has: spawn those. (Linux
    alone has copies: macOS's frameworks do not bear to be forked.)
    """
    if sys.platform != "linux":
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    return "forkserver"
