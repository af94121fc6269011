"""The usual multi-branch block: every branch of a layer as layers of its own, run on the activations and summed up.

A conv's branches each end in a batch norm of their own; those of a linear layer have none, as adapters are written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gpd_fx.kernels.compose.compose import (
    InputFilter,
    Layer,
    OutputFilter,
    Product,
    Term,
    tap,
)

aten = torch.ops.aten


class Unwritten(Exception):
    """A network has a branch that is not written down here as layers."""


class Sequence2d(nn.Module):
    """One branch as convs, run one after another, and a batch norm; conv number `main` has the layer's stride.

    `shift` is by how much its padding on each axis is less than the layer's: a kernel's taps left out before the first.
    """

    def __init__(
        self, convs: list[tuple[Tensor, int, bool]], outputs: int, main: int, shift: Sequence[int] = (0, 0)
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w.detach().clone(), trained) for w, _, trained in convs])
        self.groups = [groups for _, groups, _ in convs]
        self.main = main
        self.shift = list(shift)
        self.norm = nn.BatchNorm2d(outputs, device=convs[0][0].device)

    def forward(self, x: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
        for number, (weight, groups) in enumerate(zip(self.weights, self.groups, strict=True)):
            if number == self.main:
                less = [p - s * d for p, s, d in zip(padding, self.shift, dilation, strict=True)]
                if min(less) < 0:
                    x = functional.pad(x, [p for n in reversed(less) for p in (min(n, 0),) * 2])
                x = functional.conv2d(x, weight, None, stride, [max(n, 0) for n in less], dilation, groups)
            else:
                x = functional.conv2d(x, weight, groups=groups)
        return self.norm(x)


class ConvBranches(nn.Module):
    """A conv as the sum of its branches."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        weight, layout = layer.weight, layer.layout
        assert layout is not None
        groups, outputs = layout.groups, weight.shape[0]
        factor = _input_factor(layer)

        def point(tensor: Tensor) -> Tensor:  # the 1x1 conv that comes first takes alpha of its inputs
            return (tensor.flatten(0, 1) * factor)[..., None, None]

        def branch(term: Term) -> Sequence2d:
            if isinstance(term, OutputFilter):
                scaled = (term.filters * term.scale[..., None, None]).flatten(0, 1)[:, None]
                convs = [(point(term.point), groups, True), (scaled, outputs, term.filters.requires_grad)]
                return Sequence2d(convs, outputs, 1)
            if isinstance(term, InputFilter):
                scaled = (term.point * term.scale[..., None]).flatten(0, 1)[..., None, None]
                filters = (term.filters * factor[:, None, None]).flatten(0, 1)[:, None]
                return Sequence2d([(filters, len(filters), True), (scaled, groups, True)], outputs, 0)
            if isinstance(term, Product):
                scaled = (term.kernel * term.scale[..., None, None, None]).flatten(0, 1)
                return Sequence2d([(point(term.point), groups, True), (scaled, groups, True)], outputs, 1)
            values = (term.values * term.scale[..., None, None]).flatten(0, 1) * factor[:, None]
            line = values[:, :, :, None] if term.axis == 0 else values[:, :, None]
            shift = [0 if axis == term.axis else tap(size) for axis, size in enumerate(weight.shape[2:])]
            if any(axis != term.axis and size % 2 == 0 for axis, size in enumerate(weight.shape[2:])):
                raise Unwritten("a line through an even kernel has no symmetric padding")
            return Sequence2d([(line, groups, True)], outputs, 0, shift)

        main = Sequence2d([(weight * factor[:, None, None], groups, True)], outputs, 0)
        self.branches = nn.ModuleList([main, *map(branch, layer.terms)])

    def forward(
        self, x: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
    ) -> Tensor:
        total = self.branches[0](x, stride, padding, dilation)
        for branch in self.branches[1:]:
            total = total + branch(x, stride, padding, dilation)
        return total if bias is None else total + bias[:, None, None]


class LinearBranches(nn.Module):
    """A linear layer as the sum of its branches, two linear layers each."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        factor = _input_factor(layer)
        self.weight = nn.Parameter((layer.weight * factor).detach().clone())
        self.down = nn.ParameterList()
        self.up = nn.ParameterList()
        for term in layer.terms:
            if not isinstance(term, Product):
                raise Unwritten(f"no linear layers are written down for {type(term).__name__}")
            self.down.append(nn.Parameter((term.point[0] * factor).detach().clone()))
            self.up.append(nn.Parameter((term.kernel[0] * term.scale[0][:, None]).detach().clone()))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        total = functional.linear(x, self.weight, bias)
        for down, up in zip(self.down, self.up, strict=True):
            total = total + functional.linear(functional.linear(x, down), up)
        return total


def _input_factor(layer: Layer) -> Tensor:
    """The teacher's factor of each input."""
    alpha = layer.alpha[1] if len(layer.alpha) > 1 else None
    if layer.alpha and layer.alpha[0] is not None:
        raise Unwritten("a factor of a layer's outputs")
    return layer.weight.new_ones(layer.weight.shape[1]) if alpha is None else alpha


def with_branches(wide: fx.GraphModule, layers: Mapping[str, Layer]) -> fx.GraphModule:
    """The wide network with its branches as layers of their own.

    Raises:
        Unwritten: a layer has branches that are not written down here.
    """
    wide = copy.deepcopy(wide)
    left = {name for name, layer in layers.items() if layer.terms}
    for node in list(wide.graph.nodes):
        if node.target not in (aten.conv2d.default, aten.linear.default):
            continue
        name = str(node.args[1].target) if isinstance(node.args[1], fx.Node) else ""
        if name not in layers or not layers[name].terms:
            continue
        target = f"branches_{name.replace('.', '_')}"
        args = [*node.args[:1], *node.args[2:]]
        if node.target is aten.conv2d.default:
            args += (None, [1, 1], [0, 0], [1, 1])[len(args) - 1 :]
            wide.add_submodule(target, ConvBranches(layers[name]))
        else:
            args += (None,)[len(args) - 1 :]
            wide.add_submodule(target, LinearBranches(layers[name]))
        with wide.graph.inserting_before(node):
            new = wide.graph.call_module(target, tuple(args[:5]))
        node.replace_all_uses_with(new)
        wide.graph.erase_node(node)
        left.discard(name)
    if left:
        raise Unwritten(
            f"{len(left)} layers with branches are neither a conv2d nor a linear: {', '.join(sorted(left))}"
        )
    wide.delete_all_unused_submodules()
    wide.recompile()
    return wide


def set_identity(module: nn.Module) -> None:
    """Make the branches' batch norms in eval mode the identity."""
    for part in module.modules():
        if isinstance(part, Sequence2d):
            part.eval()
            torch.nn.init.constant_(part.norm.weight, (1 + part.norm.eps) ** 0.5)
