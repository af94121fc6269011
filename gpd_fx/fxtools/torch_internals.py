"""The few private names of torch that the library needs, in one place, each for want of a public one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.fx._pytree import tree_flatten_spec

# pyright: reportPrivateUsage=false
# This module exists to hold these uses.

OpOverload = torch._ops.OpOverload
HigherOrderOperator = torch._ops.HigherOrderOperator


def schema(op: OpOverload) -> torch.FunctionSchema:
    """The names, types and defaults of an overload's arguments."""
    return op._schema


def copy_graph(source: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, with the structure of its inputs and outputs, and where each node went."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(source, mapping))
    graph.set_codegen(source._codegen)
    return graph, mapping


def has_structure(module: fx.GraphModule) -> bool:
    """Whether a graph knows the structure of its inputs."""
    return hasattr(module.graph._codegen, "pytree_info")


def flat_inputs(module: fx.GraphModule, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[object]:
    """The values of the placeholders of a captured graph for a call, by position or by keyword as for the module.

    Raises:
        TypeError: an argument is missing, unknown or given twice.
        ValueError: an argument has another structure than it had at capture.
    """
    info = getattr(module.graph._codegen, "pytree_info")  # noqa: B009  only the code generator of captures has it
    names = [name for name in info.orig_args if name != "self"]
    if len(args) > len(names):
        raise TypeError(f"takes {len(names)} inputs ({', '.join(names)}), {len(args)} were given")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in given or name not in names:
            raise TypeError(f"has no input {name!r}" if name not in names else f"was given the input {name!r} twice")
        given[name] = value
    missing = [name for name in names if name not in given]
    if missing:
        raise TypeError(f"lacks the input {missing[0]!r}")
    keywords = list(info.in_spec.child(1).context)
    positional = [given[name] for name in names if name not in keywords]
    return tree_flatten_spec((positional, {name: given[name] for name in keywords}), info.in_spec)


def free_size(extent: object) -> bool:
    """Whether the size of a captured tensor's dimension was left open."""
    expr = getattr(getattr(extent, "node", None), "expr", None)
    return bool(getattr(expr, "free_symbols", ()))


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


enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
