"""Arguments of ATen calls by the names of the op's schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gpd_fx.fxtools.torch_internals import OpOverload, schema


def op_name(target: object) -> str:
    """A node target as reports and tables name it, e.g. `aten.conv2d.default`."""
    return str(target) if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))


def bind(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by schema name, defaults filled in."""
    bound: dict[str, Any] = {}
    for position, argument in enumerate(_arguments(node)):
        if argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = argument.default_value
    return bound


def set_arg(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of a node by its schema name, where the node gives it: by position or by keyword."""
    for position, argument in enumerate(_arguments(node)):
        if argument.name == name:
            if position < len(node.args) and not argument.kwarg_only:
                node.update_arg(position, value)
            else:
                node.update_kwarg(name, value)
            return
    raise KeyError(name)


def as_dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """A dim argument as a list of dimensions counted from the front; None and [] mean all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return list(range(rank))
    return sorted({d % rank if rank else 0 for d in ([dims] if isinstance(dims, int) else dims)})


def _arguments(node: fx.Node) -> list[torch.Argument]:
    assert isinstance(node.target, OpOverload)
    return schema(node.target).arguments
