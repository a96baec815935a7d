"""Put on PYTHONPATH by a test: makes a rank process go wrong on purpose, as FAULT_* variables say. The product has no
switch for this.

FAULT_DEADLY_TOKEN: computing a prompt that begins with it ends the process, as a bug in a kernel would.
FAULT_OTHER_VERSION: a rank that says it runs another LeanServe.
FAULT_GROUP_TIMEOUT: seconds after which a collective that waits is given up; half an hour otherwise.
FAULT_HELD: a file; while it is there, no step is computed.
FAULT_DIVERGE: a file; the rank named in it (once, then the file is removed) remembers a wrong checksum.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path
from typing import Any

TARGET = "leanserve.worker.runner"


def spoil(module: Any) -> None:
    if os.environ.get("FAULT_OTHER_VERSION") == os.environ.get("RANK"):
        import leanserve.launch.meeting

        leanserve.launch.meeting.__version__ = "0.0.0"
    if "FAULT_GROUP_TIMEOUT" in os.environ:
        module.Ranks.join.__func__.__kwdefaults__["timeout_s"] = float(os.environ["FAULT_GROUP_TIMEOUT"])
    launch, collect = module.Runner.launch, module.Runner.collect
    deadly = int(os.environ.get("FAULT_DEADLY_TOKEN", "-1"))
    diverge = Path(os.environ.get("FAULT_DIVERGE", "/nowhere"))
    held = Path(os.environ.get("FAULT_HELD", "/nowhere"))

    def faulty_launch(self: Any, batch: Any) -> None:
        while held.exists():
            time.sleep(0.01)
        launch(self, batch)
        for new in batch.started:
            if int.from_bytes(new.token_ids[:4], sys.byteorder) == deadly:
                os._exit(9)

    def diverging_collect(self: Any) -> Any:
        result = collect(self)
        if diverge.exists() and diverge.read_text() == str(self._ranks.rank):
            diverge.unlink()
            self._checksums[result.step] ^= 1
        return result

    module.Runner.launch = faulty_launch
    module.Runner.collect = diverging_collect


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            spoil(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
