"""Regions without gradients or under autocast, which capture makes graphs of their own, put back into the graph.

A region that is inlined is followed like anything else. Without gradients, whatever may require one goes in detached:
values are the same, and no gradient flows. A region under autocast is framed by the calls that enter and leave it, as
the exporter itself had it. Other graphs within a graph (conditions, loops) stay, and what they touch is frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gpd_fx.fxtools.attributes import fetch
from gpd_fx.fxtools.torch_internals import enter_autocast, exit_autocast

aten = torch.ops.aten


def inline_regions(module: fx.GraphModule, *, detached: bool = False) -> None:
    """Inline the regions of a graph, in place. `detached` says that the graph is itself a region without gradients."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            if not (enabled and detached):  # gradients within a region without: only the region itself says that
                _inline(module, node, body, operands, detached=detached or not enabled, cut=not enabled, autocast=())
        elif name == "wrap_with_autocast":
            *settings, body = node.args[:5]
            _inline(module, node, body, node.args[5:], detached=detached, cut=False, autocast=settings)


def _inline(
    module: fx.GraphModule,
    node: fx.Node,
    body: fx.Node,
    operands: Sequence[Any],
    *,
    detached: bool,
    cut: bool,
    autocast: Sequence[Any],
) -> None:
    inner = fetch(module, str(body.target))
    assert isinstance(inner, fx.GraphModule)
    inline_regions(inner, detached=detached)
    graph = module.graph
    with graph.inserting_before(node):
        given = [_detached(graph, operand) if cut else operand for operand in operands]
        where = dict(zip(inner.graph.find_nodes(op="placeholder"), given, strict=True))
        entered = None
        if autocast:
            entered = graph.call_function(enter_autocast, tuple(autocast))
            entered.meta["val"] = None
        results: Any = ()
        for item in inner.graph.nodes:
            if item.op == "output":
                results = fx.map_arg(item.args[0], lambda n: where[n])
            elif item.op != "placeholder":
                where[item] = graph.node_copy(item, lambda n: where[n])
                if item.op == "get_attr":
                    where[item].target = f"{body.target}.{item.target}"
        if entered is not None:
            graph.call_function(exit_autocast, (entered,)).meta["val"] = None
    for user in list(node.users):
        assert str(getattr(user.target, "__name__", "")) == "getitem"
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _detached(graph: fx.Graph, operand: Any) -> Any:
    """An operand as a region without gradients sees it; a buffer never requires one, and may be written to."""
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return operand
    owner = graph.owning_module
    if operand.op == "get_attr" and owner and not isinstance(fetch(owner, str(operand.target)), nn.Parameter):
        return operand
    made = graph.call_function(aten.detach.default, (operand,))
    made.meta = dict(operand.meta)
    return made


def has_autocast(module: fx.GraphModule) -> bool:
    """Whether a graph has a region under autocast."""
    return any(True for _ in module.graph.find_nodes(op="call_function", target=enter_autocast))


@contextlib.contextmanager
def restored_autocast() -> Generator[None]:
    """If what runs meanwhile raises, leave the autocast regions that it was in."""
    devices = [device for device in ("cpu", "cuda") if device == "cpu" or torch.cuda.is_available()]
    before = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    cached, depth = torch.is_autocast_cache_enabled(), _depth()
    try:
        yield
    except BaseException:
        while _depth() > depth:
            torch.autocast_decrement_nesting()
        for device, enabled, dtype in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)
        raise


def _depth() -> int:
    """How many autocast regions are entered."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
