"""Registering Python functions as operators of torch: one node each for whoever traces or compiles a model.

`torch.library.custom_op` does the same with more around it, which costs every call 20 microseconds instead of 4 (three
operators a layer, in steps that last a few milliseconds) and a process that calls one a second and a half for importing
torch's compiler, whether it compiles anything or not.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operator"]

_libraries: dict[str, torch.library.Library] = {}
"""By namespace; an operator is gone when its library is."""


def operator(
    name: str, *, fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an operator, for tensors on any device: the operator takes its place. It has no backward pass.

    Args:
        name: `namespace::name`.
        fake: the same arguments; returns empty tensors of the shapes and dtypes that the function would give.
        mutates_args: the arguments it writes to.
    """
    namespace, _, short_name = name.partition("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _libraries[namespace]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        library.define(short_name + torch.library.infer_schema(function, mutates_args=mutates_args))
        library.impl(short_name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=library)
        return getattr(getattr(torch.ops, namespace), short_name).default

    return register
