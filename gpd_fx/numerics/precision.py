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
from gpd_fx.fxtools.node_arguments import bind, op_name, set_arg
from gpd_fx.fxtools.torch_internals import OpOverload, enter_autocast

aten = torch.ops.aten
_SHARES = ("dropout_p", "dropout")  # arguments of attention and of recurrent layers
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
        name = op_name(node.target)
        if node.target is enter_autocast:  # device, dtype, enabled, ...
            node.args = (*node.args[:2], False, *node.args[3:])
            continue
        node.args = pytree.tree_map(cast, node.args)
        node.kwargs = pytree.tree_map(cast, dict(node.kwargs))
        if name.startswith(
            (
                "aten.dropout",
                "aten.native_dropout",
                "aten.feature_dropout",
                "aten.alpha_dropout",
                "aten.feature_alpha_dropout",
            )
        ):
            node.args = (node.args[0], 0.0, False)
        elif name.startswith("aten.bernoulli_"):
            node.target, node.args, node.kwargs = aten.fill_.Scalar, (node.args[0], 1.0), {}
        elif name == "aten.bernoulli.p":
            node.target, node.args, node.kwargs = aten.full_like.default, (node.args[0], 1.0), {}
        elif name.startswith("aten.rrelu"):
            node.args, node.kwargs = tuple((bind(node) | {"training": False}).values()), {}
        elif name.startswith("aten.") and (share := next((a for a in _SHARES if a in bind(node)), None)):
            set_arg(node, share, 0.0)
        elif isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            stubborn = name
    for module in modules:
        module.recompile()
    return stubborn


def is_random(graph: fx.GraphModule) -> bool:
    """Whether two runs of a graph on the same inputs may differ."""
    for node in [node for module in graphs_of(graph) for node in module.graph.nodes]:
        random = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        if random or op_name(node.target).startswith("aten.rrelu"):
            args = bind(node)
            share = args.get("p", args.get("dropout_p", args.get("dropout")))
            if not (share == 0 or False in (args.get("train"), args.get("training"))):
                return True
    return False
