"""Which ops use a parameter as the kernel of a conv or linear layer, and how."""

from __future__ import annotations

from torch import fx

from gpd_fx.fxtools.node_arguments import bind
from gpd_fx.kernels.compose.layout import KernelLayout
from gpd_fx.rules.table import entry_of


def weight_layout(node: fx.Node) -> tuple[fx.Node, KernelLayout] | None:
    """The node of the kernel that a conv or linear node uses, and how it does; None for another node."""
    entry = entry_of(node.target)
    if entry is None or entry.kernel is None:
        return None
    given, kernel = bind(node), entry.kernel
    weight = given[kernel.argument]
    groups = 1 if kernel.groups is None else given[kernel.groups]
    if not isinstance(weight, fx.Node) or not isinstance(groups, int):  # a kernel a sample: the batch's size is in it
        return None
    return weight, KernelLayout(groups, kernel.transposed, groups)
