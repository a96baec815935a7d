"""Registering Python functions as operators of torch: one node each for whoever traces or compiles a model.

`torch.library.custom_op` does the same with more around it, which costs every call 20 microseconds instead of 4 (three
operators a layer, in steps that last a few milliseconds) and a process that calls one a second and a half for importing
torch's compiler, whether it compiles anything or not.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operator"]

_LIBRARY = torch.library.Library("lean_attention", "FRAGMENT")


def operator(
    name: str, *, fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the operator `torch.ops.lean_attention.<name>`, for tensors on any device.

    It has no backward pass. What it is called with in place of the function is the operator itself.

    Args:
        fake: the same arguments; returns empty tensors of the shapes and dtypes that the function would give.
        mutates_args: the arguments it writes to.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lean_attention::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.lean_attention, name).default

    return register
