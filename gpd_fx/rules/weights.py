"""Which ops use a parameter as the weight of a conv or linear layer, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from gpd_fx.kernels.compose.layout import KernelLayout

aten = torch.ops.aten

# op -> (is it transposed, where its number of groups stands); the weight is argument 1 of each
WEIGHTED: dict[Callable[..., Any], tuple[bool, int | None]] = {
    aten.linear.default: (False, None),
    aten.conv1d.default: (False, 6),
    aten.conv2d.default: (False, 6),
    aten.conv3d.default: (False, 6),
    aten.conv1d.padding: (False, 6),
    aten.conv2d.padding: (False, 6),
    aten.conv3d.padding: (False, 6),
    aten.conv_transpose1d.default: (True, 6),
    aten.conv_transpose2d.input: (True, 6),
    aten.conv_transpose3d.input: (True, 6),
}


def weight_layout(node: fx.Node) -> tuple[fx.Node, KernelLayout] | None:
    """The node of the weight that a conv or linear node uses, and how it does; None for another node."""
    if node.op != "call_function" or node.target not in WEIGHTED:
        return None
    transposed, at = WEIGHTED[node.target]  # pyright: ignore[reportArgumentType]  found there a line above
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if not isinstance(weight, fx.Node):
        return None
    groups = 1
    if at is not None:
        groups = node.args[at] if len(node.args) > at else node.kwargs.get("groups", 1)
    if not isinstance(groups, int):  # a kernel a sample: the batch's size is in it
        return None
    return weight, KernelLayout(groups, transposed, groups)
