"""Where Triton's interpreter can run the kernels on the CPU: the mark of tests that need it."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest

__all__ = ["needs_interpreter"]


def _missing() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed here"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return "the interpreter of Triton 3.6 makes scalars of arrays, which NumPy refuses from 2.4 on"
    return None


def _release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


needs_interpreter = pytest.mark.skipif(_missing() is not None, reason=_missing() or "")
