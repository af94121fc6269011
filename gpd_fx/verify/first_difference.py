"""The first node at which a wide graph no longer gives the copies of what the model's graph gives."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gpd_fx.axes.expressions import Expr
from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import flat_inputs, put_tensor
from gpd_fx.numerics.comparison import relative_error
from gpd_fx.plan.plan import Plan

aten = torch.ops.aten


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of each node's result, as it is when the node has run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.results[n.name] = pytree.tree_map_only(Tensor, torch.clone, result)
        return result


def _record(module: fx.GraphModule, tensors: Mapping[str, Tensor], inputs: Any) -> dict[str, Any]:
    bound = copy.deepcopy(module)
    for name, tensor in tensors.items():
        put_tensor(bound, name, tensor.clone())
    recorder = _Recorder(bound)
    flat = flat_inputs(module, *inputs)
    with contextlib.suppress(Exception):  # what ran before the node that failed is what counts
        recorder.run(*pytree.tree_map_only(Tensor, torch.clone, flat), enable_io_processing=False)
    return recorder.results


def first_difference(
    plan: Plan,
    key: str,
    source: fx.GraphModule,
    wide: fx.GraphModule,
    tensors: Mapping[str, Tensor],
    wide_tensors: Mapping[str, Tensor],
    inputs: Any,
    tolerance: float,
) -> str:
    """The first node whose wide result is not the copies of the model's result, in words.

    `tensors` and `wide_tensors` are all that the graphs read, constants included.
    """
    expected, actual = _record(source, tensors, inputs), _record(wide, wide_tensors, inputs)
    facts = plan.analysis.graphs[key]
    last = {name: _final(wide, name, expected) for name in expected}
    for node in facts.module.graph.nodes:
        value = facts.values.get(node)
        if last[node.name] not in actual:
            return f"The first node that fails is {node.name!r} ({op_name(node.target)})."
        if node.op != "call_function" or not isinstance(value, list) or not isinstance(expected[node.name], Tensor):
            continue
        wanted, found = _copies(plan, expected[node.name], value), actual[last[node.name]]
        error = relative_error(wanted, found)
        if error > tolerance:
            shapes = f"{list(expected[node.name].shape)} -> {list(found.shape)}"
            return f"The first node that differs is {node.name!r} ({op_name(node.target)}, {shapes}), by {error:.1e}."
    return "No single node differs."


def _copies(plan: Plan, tensor: Tensor, axes: Sequence[Expr]) -> Tensor:
    for dim, axis in enumerate(axes):
        if plan.widening.widens(axis):
            tensor = tensor.index_select(dim, plan.widening.gather(axis).to(tensor.device))
    return tensor


def _final(wide: fx.GraphModule, name: str, names: Mapping[str, Any]) -> str:
    """The node that stands for the model's node of that name, of those `names`: behind what widening put after it."""
    node = next(n for n in wide.graph.nodes if n.name == name)
    users = list(node.users)
    if len(users) == 1 and users[0].target in (aten.mul.Tensor, aten.add.Tensor) and users[0].name not in names:
        return name if isinstance(users[0].args[1], fx.Node) else users[0].name  # alpha belongs to the user's operand
    return name
