"""What a layer's kernel is the sum of: the terms that branches are lowered to, and one layer with all it needs.

A kernel in canonical order is (g, o, i, *k): groups, outputs and inputs of a group, kernel axes. With v the scale of
each output channel, P a pointwise kernel, F one filter a channel, K a kernel of inner width c, a term is

    OutputFilter    v[o] P[o,i] F[o,k]                a 1x1 conv, then a depthwise conv
    InputFilter     v[o] P[o,i] F[i,k]                a depthwise conv, then a 1x1 conv
    Product         v[o] sum_c K[o,c,k] P[c,i]        a 1x1 conv to c channels, then a conv
    Line            v[o] L[o,i,k_a] on axis a         a conv along one axis, at the `tap` of the others
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from gpd_fx.kernels.compose.layout import KernelLayout, Slice


def tap(size: int) -> int:
    """Where the single tap of a 1x1 kernel sits on a kernel axis: the centre, left of it on an even axis."""
    return (size - 1) // 2


@dataclass(frozen=True)
class OutputFilter:
    """A pointwise kernel and one filter an output channel: `point` (g, o, i), `filters` (g, o, *k)."""

    scale: Tensor  # (g, o), in every term
    point: Tensor
    filters: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.scale, self.point, self.filters


@dataclass(frozen=True)
class InputFilter:
    """One filter an input channel and a pointwise kernel: `point` (g, o, i), `filters` (g, i, *k)."""

    scale: Tensor
    point: Tensor
    filters: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.scale, self.point, self.filters


@dataclass(frozen=True)
class Product:
    """A pointwise kernel to c channels and a kernel from them: `point` (g, c, i), `kernel` (g, o, c, *k)."""

    scale: Tensor
    point: Tensor
    kernel: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.scale, self.point, self.kernel


@dataclass(frozen=True)
class Line:
    """A kernel along one axis: `values` (g, o, i, k_axis)."""

    scale: Tensor
    values: Tensor
    axis: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.scale, self.values


Term: TypeAlias = OutputFilter | InputFilter | Product | Line
TERMS = (OutputFilter, InputFilter, Product, Line)
"""All kinds."""


@dataclass(frozen=True)
class Layer:
    """One parameter: its tensors, and what is known about it before the step.

    Attributes:
        weight: the wide weight, in storage order.
        layout: how it is used as a kernel; only needed where there are terms.
        terms: what the branches add to it.
        alpha: the teacher's factor of each dimension in storage order, or empty; constants, without a gradient.
        slices: the student's slice of each dimension in storage order.
        shape: the student's shape.
    """

    weight: Tensor
    layout: KernelLayout | None
    terms: tuple[Term, ...]
    alpha: tuple[Tensor | None, ...]
    slices: tuple[Slice, ...]
    shape: tuple[int, ...]
