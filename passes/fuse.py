"""Run a depthwise conv and the batch norm behind it as one op, which keeps nothing of what lies between them.

before    y = conv2d(x, w, b, ..., groups)    z = batch_norm(y, gamma, beta, mean, var, ...)
after     z = depthwise_norm(x, w, b, gamma, beta, mean, var, ...)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from gpd_fx.fxtools.attributes import fetch, with_graph
from gpd_fx.fxtools.node_arguments import bind, op_name
from gpd_fx.fxtools.torch_internals import OpOverload, copy_graph, schema
from gpd_fx.kernels.depthwise.launch import MOST_SIDE, padding_of
from gpd_fx.kernels.depthwise.op import depthwise_norm
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.passes.nothing_done import seen
from gpd_fx.rules.weights import weight_layout

aten = torch.ops.aten
MOST_STRIDE = 2
"""Rows times columns: with x of so many times the elements of z, one op moves 5 x + 5 z, two move 3 x + 11 z."""


@dataclass(frozen=True)
class Pair:
    """A depthwise conv, the batch norm behind it, and why they stay two; None where they need not."""

    conv: fx.Node
    norm: fx.Node | None
    weight: str
    padding: list[int] | None
    reason: str | None


@dataclass(frozen=True)
class FuseDepthwise(Pass):
    """Fuses every depthwise conv with its batch norm, but where either takes an attribute in `but`, which says why."""

    but: Mapping[str, str] = field(default_factory=dict[str, str])

    def run(self, module: fx.GraphModule) -> PassResult:
        graph = copy_graph(module.graph)[0]
        notes: list[str] = []
        changed = False
        for pair in list(pairs_of(with_graph(module, graph), self.but)):
            notes.append(f"{pair.conv.name}: {pair.reason or 'one op with its batch norm'}")
            if pair.reason is None:
                _fuse(pair)
                changed = True
        if not notes:
            notes.append(f"no depthwise conv2d takes its kernel from an attribute; {seen(module)}")
        return PassResult(with_graph(module, graph), changed, tuple(notes))

    def ensures(self, module: fx.GraphModule) -> None:
        copy_graph(module.graph)[0].lint()  # on its own: empty places are no fault


def pairs_of(module: fx.GraphModule, but: Mapping[str, str]) -> Iterator[Pair]:
    """Each depthwise conv2d whose kernel is an attribute; `but` is as the pass takes it."""
    for node in module.graph.nodes:
        found = weight_layout(node)
        if found is None or node.target not in (aten.conv2d.default, aten.conv2d.padding) or found[0].op != "get_attr":
            continue
        weight, layout = found
        kernel = fetch(module, str(weight.target))
        if not isinstance(kernel, Tensor) or not layout.groups == len(kernel) > 1 == kernel.shape[1]:
            continue
        norm = next(iter(node.users), None)
        conv = bind(node)
        padding = padding_of(conv["padding"], kernel.shape[2:], conv["dilation"])
        reason = _obstacle(node, norm, kernel, padding)
        if reason is None and norm is not None:
            taken = [str(given.target) for given in (*node.all_input_nodes, *norm.all_input_nodes)]
            reason = next((but[target] for target in taken if target in but), None)
        yield Pair(node, norm, str(weight.target), padding, reason)


def _obstacle(conv: fx.Node, norm: fx.Node | None, kernel: Tensor, padding: list[int] | None) -> str | None:
    """Why a conv and what follows it stay two ops."""
    if norm is None or len(conv.users) != 1:
        return f"its output has {len(conv.users)} users"
    if norm.target is not aten.batch_norm.default or norm.all_input_nodes.count(conv) != 1 or norm.args[0] is not conv:
        return f"{op_name(norm.target)} follows, not a batch norm"
    if max(kernel.shape[2:]) > MOST_SIDE:
        return f"its kernel of {'x'.join(map(str, kernel.shape[2:]))} is larger than {MOST_SIDE}x{MOST_SIDE}"
    if padding is None:
        return "its padding differs from one side to the other"
    if prod(bind(conv)["stride"]) > MOST_STRIDE:
        return "by its stride it reads so much more than it writes that one op would read more"
    node = conv.next
    while node is not norm:
        if not _harmless(node, {attribute.target for attribute in conv.all_input_nodes}):
            return f"node {node.name!r} in between changes what they are given or how they run"
        node = node.next
    return None


def _harmless(node: fx.Node, used: Set[Any]) -> bool:
    """Whether a conv before a node, which takes the attributes `used`, may as well run after it."""
    if node.op != "call_function":
        return node.op in ("get_attr", "placeholder")
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    changed = node.args[0] if node.args else None
    counts = isinstance(changed, fx.Node) and changed.op == "get_attr" and changed.target not in used
    return counts or not schema(node.target).is_mutable  # what a norm counts are batches


def _fuse(pair: Pair) -> None:
    conv, norm = pair.conv, pair.norm
    assert norm is not None
    first, second = bind(conv), bind(norm)
    args = [first["input"], first["weight"], first["bias"]]
    args += [second[name] for name in ("weight", "bias", "running_mean", "running_var")]
    args += [[*first["stride"]], pair.padding, [*first["dilation"]]]
    args += [second[name] for name in ("training", "momentum", "eps")]
    graph = norm.graph
    with graph.inserting_before(norm):
        fused = graph.call_function(depthwise_norm, tuple(args))
    fused.meta |= dict(norm.meta)
    norm.replace_all_uses_with(fused)
    graph.erase_node(norm)
    graph.erase_node(conv)
