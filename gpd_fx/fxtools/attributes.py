"""Attributes of modules at dotted paths, such as `layer1.0.conv1.weight`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn


def fetch(module: nn.Module, path: str) -> Any:
    """The attribute at a path."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def put(module: nn.Module, path: str, value: object, *, like: object) -> None:
    """Set the attribute at a path, making the modules on the way; `like` says whether it is a parameter or a buffer.

    An empty place (None) is registered too, so that a tensor can stand there later.
    """
    *owners, name = path.split(".")
    for owner in owners:
        if not hasattr(module, owner):
            module.add_module(owner, nn.Module())
        module = getattr(module, owner)
    if name in vars(module):  # a GraphModule turns empty places into attributes
        delattr(module, name)
    if isinstance(like, nn.Parameter):
        module.register_parameter(name, value)  # pyright: ignore[reportArgumentType]  a parameter or None
    elif isinstance(like, Tensor):
        module.register_buffer(name, value, persistent=value is not None)  # pyright: ignore[reportArgumentType]  likewise
    else:
        setattr(module, name, value)


def graphs_of(module: nn.Module) -> list[fx.GraphModule]:
    """A graph module and those inside it, which are the bodies of some of its calls."""
    return [inner for inner in module.modules() if isinstance(inner, fx.GraphModule)]


def has(module: nn.Module, path: str) -> bool:
    """Whether there is an attribute at a path, be it None."""
    try:
        fetch(module, path)
    except AttributeError:
        return False
    return True


def with_graph(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module of `graph` that shares its attributes with `module`; empty places are plain attributes."""
    root = nn.Module()
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = fetch(module, str(node.target))
            put(root, str(node.target), value, like=value)
    return fx.GraphModule(root, graph)
