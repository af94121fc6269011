"""The arithmetic that a graph is checked in: float64, or float32 where float64 would not fit into memory.

`deterministic` gives a graph one arithmetic throughout and takes all randomness out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gpd_fx.fxtools.attributes import graphs_of
from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import OpOverload, enter_autocast
from gpd_fx.rules.entry import Randomness
from gpd_fx.rules.table import entry_of

COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


@dataclass(frozen=True)
class Precision:
    """A floating dtype that stands in the place of every other."""

    real: torch.dtype

    @property
    def unit(self) -> float:
        """One unit in the last place of 1."""
        return torch.finfo(self.real).eps

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a dtype becomes."""
        if dtype.is_complex:
            return COMPLEX[self.real]
        return self.real if dtype.is_floating_point else dtype

    def exact(self, tensor: Tensor) -> Tensor:
        """A tensor in this precision, if it is not integer; itself where it is so already."""
        return tensor.to(self.dtype(tensor.dtype))


DOUBLE, SINGLE = Precision(torch.float64), Precision(torch.float32)
LARGE = 2 * 2**30  # bytes in float64 from which on float32 is used


def precision_for(elements: int) -> Precision:
    """float64, or float32 for so many elements that they would be large."""
    return SINGLE if elements * 8 > LARGE else DOUBLE


def deterministic(graph: fx.GraphModule, precision: Precision = DOUBLE) -> str | None:
    """Switch off what is random in a graph and make float casts those of a precision; in place.

    Returns:
        The name of a random op that cannot be switched off, or None.
    """

    def cast(value: Any) -> Any:
        return precision.dtype(value) if isinstance(value, torch.dtype) else value

    stubborn: str | None = None
    modules = graphs_of(graph)
    for node in [node for module in modules for node in module.graph.nodes if node.op == "call_function"]:
        if node.target is enter_autocast:  # device, dtype, enabled, ...
            node.args = (*node.args[:2], False, *node.args[3:])
            continue
        node.args = pytree.tree_map(cast, node.args)
        node.kwargs = pytree.tree_map(cast, dict(node.kwargs))
        random = _randomness(node)
        if random is not None:
            random.switch_off(node)
        elif _draws(node):
            stubborn = op_name(node.target)
    for module in modules:
        module.recompile()
    return stubborn


def is_random(graph: fx.GraphModule) -> bool:
    """Whether two runs of a graph on the same inputs may differ."""
    for node in [node for module in graphs_of(graph) for node in module.graph.nodes]:
        random = _randomness(node)
        if _draws(node) if random is None else not random.is_off(node):
            return True
    return False


def _randomness(node: fx.Node) -> Randomness | None:
    """How a node's op is kept from drawing, where the table says so."""
    entry = entry_of(node.target)
    return None if entry is None else entry.random


def _draws(node: fx.Node) -> bool:
    """Whether torch says of a node's op that it draws random numbers."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
