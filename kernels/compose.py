"""Composing the kernels of all layers, in one call, for both networks.

A layer's kernel, in canonical order (g, o, i, *k), is its weight plus terms that the branches are lowered to. With v
the scale of each output channel, P a pointwise kernel, F one filter a channel, K a kernel of inner width c:

    OutputFilter    v[o] P[o,i] F[o,k]                a 1x1 conv, then a depthwise conv
    InputFilter     v[o] P[o,i] F[i,k]                a depthwise conv, then a 1x1 conv
    Product         v[o] sum_c K[o,c,k] P[c,i]        a 1x1 conv to c channels, then a conv
    Line            v[o] L[o,i,k_a] on axis a         a conv along one axis, at the `tap` of the others

    M = W + sum of terms;   the teacher's kernel is alpha[i] M, the student's is M[slice]

v always multiplies the smaller factor. All OutputFilter terms of a layer are one batched product of inner size
(number of terms), which reads W and writes M once, forward and backward. Nothing here depends on values, so a fused
kernel over the flat list of layers can take the place of `compose`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from gpd_fx.layout import KernelLayout, Slice, along, take


def tap(size: int) -> int:
    """Where the single tap of a 1x1 kernel sits on a kernel axis: the centre, left of it on an even axis."""
    return (size - 1) // 2


@dataclass(frozen=True)
class OutputFilter:
    """A pointwise kernel and one filter an output channel: `point` (g, o, i), `filters` (g, o, *k)."""

    scale: Tensor  # (g, o), in every term
    point: Tensor
    filters: Tensor


@dataclass(frozen=True)
class InputFilter:
    """One filter an input channel and a pointwise kernel: `point` (g, o, i), `filters` (g, i, *k)."""

    scale: Tensor
    point: Tensor
    filters: Tensor


@dataclass(frozen=True)
class Product:
    """A pointwise kernel to c channels and a kernel from them: `point` (g, c, i), `kernel` (g, o, c, *k)."""

    scale: Tensor
    point: Tensor
    kernel: Tensor


@dataclass(frozen=True)
class Line:
    """A kernel along one axis: `values` (g, o, i, k_axis)."""

    scale: Tensor
    values: Tensor
    axis: int


Term: TypeAlias = OutputFilter | InputFilter | Product | Line


@dataclass(frozen=True)
class Layer:
    """One parameter: its tensors, and what is known about it before the step.

    Attributes:
        weight: the wide weight, in storage order.
        layout: how it is used as a kernel; only needed where there are terms.
        terms: what the branches add to it.
        alpha: the teacher's factor of each dimension in storage order, or empty.
        slices: the student's slice of each dimension in storage order.
        shape: the student's shape.
    """

    weight: Tensor
    layout: KernelLayout | None
    terms: tuple[Term, ...]
    alpha: tuple[Tensor | None, ...]
    slices: tuple[Slice, ...]
    shape: tuple[int, ...]


def compose(layers: Sequence[Layer], teacher: bool = True, student: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's and the student's tensor of every layer; a list that was not asked for is empty.

    The student's tensors are contiguous. A tensor that needs no arithmetic may share the weight's memory.
    """
    wide: list[Tensor] = []
    narrow: list[Tensor] = []
    if not layers:
        return wide, narrow
    # a sum rounded to bf16 would lose what the branches learn: autocast may round what comes out, not what goes in
    device = layers[0].weight.device.type
    with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # meta has none
        for layer in layers:
            kernel = merge(layer)
            if student:
                narrow.append(take(kernel, layer.slices, layer.shape).contiguous())
            if teacher:
                for dim, alpha in enumerate(layer.alpha):
                    if alpha is not None:
                        kernel = kernel * along(alpha, dim, kernel.dim())
                wide.append(kernel)
    return wide, narrow


def merge(layer: Layer) -> Tensor:
    """The layer's kernel M in storage order."""
    if not layer.terms or layer.layout is None:
        return layer.weight
    kernel = layer.layout.canonical(layer.weight)
    filters = [term for term in layer.terms if isinstance(term, OutputFilter)]
    if filters:
        kernel = _add_output_filters(kernel, filters)
    for term in layer.terms:
        if isinstance(term, InputFilter):
            kernel = _add_input_filter(kernel, term)
        elif isinstance(term, Product):
            kernel = _add_product(kernel, term)
        elif isinstance(term, Line):
            kernel = _add_line(kernel, term)
    return layer.layout.stored(kernel)


def _add_output_filters(kernel: Tensor, terms: Sequence[OutputFilter]) -> Tensor:
    rows = kernel.shape[0] * kernel.shape[1]
    points = torch.stack([t.point * t.scale[..., None] for t in terms], dim=-1)  # (g, o, i, term)
    filters = torch.stack([t.filters.flatten(2) for t in terms], dim=2)  # (g, o, term, k)
    summed = torch.baddbmm(  # (g o) times: (i, term) @ (term, k)
        kernel.reshape(rows, kernel.shape[2], -1), points.flatten(0, 1), filters.flatten(0, 1)
    )
    return summed.reshape(kernel.shape)


def _add_input_filter(kernel: Tensor, term: InputFilter) -> Tensor:
    point = term.point * term.scale[..., None]
    return torch.addcmul(kernel, point.reshape(*point.shape, *(1,) * (kernel.dim() - 3)), term.filters[:, None])


def _add_product(kernel: Tensor, term: Product) -> Tensor:
    if kernel.dim() == 3:  # a linear layer: one product that accumulates
        return torch.baddbmm(kernel, term.kernel * term.scale[..., None], term.point)
    scaled = term.kernel.flatten(3) * term.scale[..., None, None]
    return kernel + torch.einsum("gock,gci->goik", scaled, term.point).reshape(kernel.shape)


def _add_line(kernel: Tensor, term: Line) -> Tensor:
    sizes = kernel.shape[3:]
    shape = [n if axis == term.axis else 1 for axis, n in enumerate(sizes)]
    values = (term.values * term.scale[..., None, None]).reshape(*kernel.shape[:3], *shape)
    pad: list[int] = []
    for axis, n in reversed(list(enumerate(sizes))):  # `pad` starts with the last dimension
        pad += [0, 0] if axis == term.axis else [tap(n), n - 1 - tap(n)]
    return kernel + functional.pad(values, pad)
