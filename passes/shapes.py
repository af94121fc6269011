"""The values that a graph's nodes record for their results, computed anew after the graph has changed.

`node.meta["val"]` holds a fake tensor (shape, dtype, device, no data) for each node of a captured graph, with symbolic
sizes where the exporter left them open. Analyses, importers and other passes read it, so a pass that changes shapes
has to recompute it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import rebind_unbacked
from torch.utils import _pytree as pytree

from gpd_fx.errors import PassError
from gpd_fx.fxtools.attributes import fetch
from gpd_fx.fxtools.module_calls import call_with, tensors_of
from gpd_fx.fxtools.regions import restored_autocast

VALUE = "val"
"""Key in the meta of a node: the fake tensor of its result, or a structure of them."""


def has_values(module: fx.GraphModule) -> bool:
    """Whether every input of a graph records its value, and every attribute that the graph reads is there."""
    return all(VALUE in node.meta for node in module.graph.find_nodes(op="placeholder")) and all(
        fetch(module, str(node.target)) is not None for node in module.graph.find_nodes(op="get_attr")
    )


def refresh_values(module: fx.GraphModule) -> bool:
    """Recompute `meta["val"]` of every node from the values of the inputs, in place, by running on fake tensors.

    Symbolic sizes stay symbolic, and nothing is added to what the exporter assumed about them. Stale records of
    `tensor_meta` are dropped.

    Args:
        module: a graph whose inputs record their values, as a captured graph's do.

    Returns:
        False, with nothing changed, where an input records no value or an attribute of the graph is an empty place.

    Raises:
        PassError: the graph cannot run on the shapes of its inputs; the message names the node.

    Example:
        >>> graph = gpd_fx.capture(nn.Linear(3, 4), (torch.randn(2, 3),))
        >>> refresh_values(graph)
        True
    """
    if not has_values(module):
        return False
    inputs = [node.meta[VALUE] for node in module.graph.find_nodes(op="placeholder")]
    mode = _mode_of(inputs)
    with mode, enable_python_dispatcher(), torch.no_grad(), restored_autocast(), _without_side_effects(mode):
        _Values(module, mode).run(*inputs, enable_io_processing=False)
    return True


class _Values(fx.Interpreter):
    """Runs a graph on fake tensors and records what each node gives."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode
        self.extra_traceback = False  # the error below names the node

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except PassError:
            raise
        except Exception as error:
            raise PassError(
                f"node {n.name!r} ({n.op} {n.target}) cannot run on the shapes of its operands: "
                f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            ) from error
        if n.op in ("placeholder", "output"):
            return result
        n.meta.pop("tensor_meta", None)
        if self._mode.shape_env is not None and "unbacked_bindings" in n.meta:
            rebind_unbacked(self._mode.shape_env, n, result)
        n.meta[VALUE] = pytree.tree_map(_record, result)
        return result

    def fetch_attr(self, target: str) -> Any:
        return pytree.tree_map_only(Tensor, self._fake, super().fetch_attr(target))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        submodule = fetch(self.module, str(target))
        return call_with(submodule, {n: self._fake(t) for n, t in tensors_of(submodule).items()}, args, kwargs)

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        return self._mode.from_tensor(tensor, static_shapes=True)


def _record(value: Any) -> Any:
    """What is recorded of a result; of a tensor an alias, since an in-place op that follows may change its size."""
    if isinstance(value, Tensor):
        return value.detach()
    return value if isinstance(value, bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool) else None


def _mode_of(inputs: list[Any]) -> FakeTensorMode:
    """The mode that the recorded inputs belong to."""
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return FakeTensorMode()


@contextlib.contextmanager
def _without_side_effects(mode: FakeTensorMode) -> Generator[None]:
    """While open, the mode takes real tensors too, and running assumes nothing new about symbolic sizes."""
    allowed = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        with contextlib.ExitStack() as stack:
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            yield
    finally:
        mode.allow_non_fake_inputs = allowed
