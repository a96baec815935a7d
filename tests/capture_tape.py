"""What capturing a CUDA graph does to a piece of work, on a machine without a GPU.

A tape writes down every operator that the work calls, with its arguments; a replay calls them again, in order, and puts
each result where the first one was put. As with a graph, Python does not run again: what it had read from the host, or
decided by a value, stays as it was. And as with a graph, the work is refused if it needs the host.
"""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS_FOR_THE_DEVICE = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::repeat_interleave",
    "aten::equal",
    "aten::is_nonzero",
)
"""Operators whose result, or its shape, the host must know."""


class CaptureError(Exception):
    """A capture would have failed, or been wrong."""


def refuse_waits(name: str, args: tuple[Any, ...], error: type[Exception]) -> None:
    """Raise `error` for an operator whose call makes the host wait for the device."""
    if name in WAITS_FOR_THE_DEVICE:
        raise error(f"{name} waits for the device")
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and any(
        tensor.dtype == torch.bool for tensor in tree_leaves(args[1]) if tensor is not None
    ):
        raise error(f"{name} by a mask waits for the device")


class Tape(TorchDispatchMode):
    """Records the operators called inside `with`.

    Args:
        resident: the storages that the work may read although it has not made them: they stay where they are.
    """

    def __init__(self, resident: set[int]) -> None:
        super().__init__()
        self._resident = resident
        self._made: set[int] = set()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        refuse_waits(name, args, CaptureError)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if storage_of(tensor) not in self._resident | self._made:
                raise CaptureError(f"{name} reads a tensor of shape {tuple(tensor.shape)} that the next step has not")
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device for tensor in tensors + results}) > 1:
            raise CaptureError(f"{name} moves numbers between the device and the host")
        inputs = {storage_of(tensor) for tensor in tensors}
        self._made |= {storage_of(tensor) for tensor in results}
        self._calls.append((func, args, kwargs, [None if storage_of(r) in inputs else r for r in results]))
        return result

    def replay(self) -> None:
        """Do it all again."""
        for func, args, kwargs, results in self._calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for old, new in zip(results, again, strict=True):
                if old is not None:  # None: the result lies in an argument
                    old.copy_(new)

    @property
    def launches(self) -> list[tuple[Any, ...]]:
        """Every operator with all that shapes its launch: shapes and strides of tensors, and the other arguments."""
        return [
            (func.name(), *(launch_argument(leaf) for leaf in tree_leaves((args, kwargs))))
            for func, args, kwargs, _ in self._calls
        ]


class TapeCapture:
    """Stands where `CudaCapture` does. What hangs on the work itself is where it reads from."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        tape = Tape(storages_of(work))
        self.tapes.append(tape)
        with tape:
            work()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def launch_argument(leaf: Any) -> Any:
    return (leaf.dtype, tuple(leaf.shape), leaf.stride()) if isinstance(leaf, torch.Tensor) else leaf


def storages_of(work: Callable[..., Any]) -> set[int]:
    """Storages of all tensors that hang on a function: on what it closes over, on the attributes of that, and so on."""
    found: set[int] = set()
    seen: set[int] = set()
    rest: list[Any] = [work]
    while rest:
        thing = rest.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.add(storage_of(thing))
        elif isinstance(thing, list | tuple):
            rest += thing
        elif isinstance(thing, dict):
            rest += thing.values()
        elif isinstance(thing, FunctionType):
            rest += [cell.cell_contents for cell in thing.__closure__ or ()]
        elif isinstance(thing, MethodType):
            rest.append(thing.__self__)
        elif type(thing).__module__.startswith("leanserve"):
            rest += getattr(thing, "__dict__", {}).values()
    return found
