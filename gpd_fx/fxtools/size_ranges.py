"""The sizes of inputs for which a capture is valid: the ranges that torch.export found for free dimensions."""

from __future__ import annotations

from typing import Any

import sympy
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_symbolic

RANGES = "gpd_fx_ranges"
"""Key in the meta of a placeholder: for each free dimension, the smallest and the largest size (None: no limit)."""

SizeRange = tuple[int, int | None]


def size_ranges(program: ExportedProgram) -> dict[str, dict[int, SizeRange]]:
    """For each input by name, the sizes that each free dimension may have.

    torch.export assumes of every free size that it is at least 2, whatever the model does, so a least size of 2 is
    taken for no limit. What Python code decides by a size, such as a batch that it splits, gives the others.
    """
    found: dict[str, dict[int, SizeRange]] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for dim, extent in enumerate(value.shape if isinstance(value, Tensor) else ()):
            limits = _limits(program, extent) if is_symbolic(extent) else None
            if limits is not None:
                found.setdefault(node.name, {})[dim] = limits
    return found


def _limits(program: ExportedProgram, extent: Any) -> SizeRange | None:
    """The range of a size that is a symbol by itself; None for an expression and where there is no limit."""
    limits = program.range_constraints.get(extent.node.expr)
    if limits is None:
        return None
    low, high = (int(limit) if isinstance(limit, sympy.Integer) else None for limit in (limits.lower, limits.upper))
    low = 0 if low is None else low
    return None if low <= 2 and high is None else (0 if low <= 2 else low, high)


def outside(node: fx.Node, leaf: Tensor) -> tuple[int, SizeRange] | None:
    """The first dimension of an input whose size is outside of its range, with the range."""
    for dim, (low, high) in node.meta.get(RANGES, {}).items():
        if leaf.shape[dim] < low or (high is not None and leaf.shape[dim] > high):
            return dim, (low, high)
    return None
