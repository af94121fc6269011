"""The few private names of torch that the library needs, in one place, each for want of a public one."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

# pyright: reportPrivateUsage=false
# This module exists to hold these uses.

OpOverload = torch._ops.OpOverload


def schema(op: OpOverload) -> torch.FunctionSchema:
    """The names, types and defaults of an overload's arguments."""
    return op._schema


def copy_graph(source: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, with the structure of its inputs and outputs, and where each node went."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(source, mapping))
    graph.set_codegen(source._codegen)
    return graph, mapping


def flat_inputs(module: fx.GraphModule, args: tuple[object, ...], kwargs: dict[str, object]) -> list[object]:
    """The values of the placeholders for a call of the module."""
    return list(module.graph._codegen.process_inputs(*args, **kwargs))


def drop_parameters(module: nn.Module) -> None:
    """Leave an empty place for each parameter of a module and those below it; names and order stay."""
    for owner in module.modules():
        for name in owner._parameters:
            owner._parameters[name] = None


def forget_flat_weights(module: nn.RNNBase) -> None:
    """Let a recurrent module look its weights up at the next call; it keeps a list of those it last saw."""
    lists: dict[str, object] = vars(module)
    count = len(module._flat_weights_names)
    lists["_flat_weights"] = [None] * count
    lists["_flat_weight_refs"] = [_gone] * count


def look_up_flat_weights(module: nn.RNNBase) -> None:
    """Let a recurrent module list the weights that it has now."""
    module._init_flat_weights()


def _gone() -> None:
    """What a weak reference gives whose object is no more."""


def put_tensor(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a plain tensor in the place of the parameter or buffer at a dotted path."""
    owner, _, leaf = path.rpartition(".")
    holder = module.get_submodule(owner)
    vars(holder).pop(leaf, None)
    holder._parameters.pop(leaf, None)
    holder._buffers[leaf] = tensor
