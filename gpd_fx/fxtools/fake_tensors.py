"""Calls on fake tensors, which cost no memory and no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from gpd_fx.fxtools.attributes import put
from gpd_fx.fxtools.module_calls import call_with, tensors_of, unchanged
from gpd_fx.fxtools.regions import restored_autocast
from gpd_fx.fxtools.torch_internals import copy_graph, flat_inputs


def fake_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module on fakes of its parameters, buffers and inputs; nothing of it changes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with unchanged(module), mode, torch.no_grad():
        state = {name: mode.from_tensor(tensor) for name, tensor in tensors_of(module).items()}
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        return call_with(module, state, args, kwargs)


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor that a node gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = result.shape
        return result


def shapes_of(
    module: fx.GraphModule, shapes: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, torch.Size]:
    """The shape of what each node of a captured graph gives for inputs of the shapes of these; nothing is computed.

    `shapes` are tensors to put in the graph's places; of them and of the inputs only shape and dtype count.
    """
    twin = fx.GraphModule(module, copy_graph(module.graph)[0])
    device = next((tensor.device for tensor in shapes.values()), torch.device("cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), restored_autocast():

        def empty(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

        for path, tensor in shapes.items():
            put(twin, path, empty(tensor), like=tensor.detach())
        inputs = pytree.tree_map_only(Tensor, empty, flat_inputs(module, args, kwargs))
        run = _Shapes(twin)
        run.run(*inputs, enable_io_processing=False)
    return run.found
