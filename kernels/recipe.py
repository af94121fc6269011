"""Layers as an operator can take them: a flat list of tensors, and a text that says what they are.

An operator's arguments are tensors and plain values, and its graph must not depend on Python objects. So everything
about the layers that is known before the step becomes a text of integers, which is read back once and remembered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpd_fx.kernels.terms import InputFilter, Layer, Line, OutputFilter, Product, Term
from gpd_fx.layout import Cut, KernelLayout, Slice

_FILTERS = (OutputFilter, InputFilter, Product)
OUTPUT_FILTER, INPUT_FILTER, PRODUCT, LINE = range(4)
"""The kinds of terms, by number; the first three have the tensors of `_FILTERS`."""
_WHOLE, _CUT, _INDEX = range(3)


class Operands(NamedTuple):
    """The tensors of one layer but its weight."""

    alpha: tuple[Tensor | None, ...]
    slices: tuple[Slice, ...]
    terms: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is known about one layer before the step; equal only to itself, since `parse` makes each but once.

    Attributes:
        wide: the shape of the weight.
        layout: how it is used as a kernel.
        terms: number of the kind, and axis, of each term.
        alpha: which dimensions have a factor.
        slices: a cut, True for an index, None for the whole dimension.
        shape: the student's shape.
        teacher, student: which of the two tensors are asked for.
        last: whether the weight lies with its channels last, and so shall what is made of it.
    """

    wide: tuple[int, ...]
    layout: KernelLayout | None
    terms: tuple[tuple[int, int], ...]
    alpha: tuple[bool, ...]
    slices: tuple[Cut | bool | None, ...]
    shape: tuple[int, ...]
    teacher: bool
    student: bool
    last: bool

    @property
    def canonical(self) -> tuple[int, int, int, int]:
        """The sizes (g, o, i, taps) of a layer that has terms."""
        assert self.layout is not None
        g, o, i, *kernel = self.layout.canonical_shape(self.wide)
        return g, o, i, math.prod(kernel)

    @property
    def is_kernel(self) -> bool:
        """Whether it is the weight of a conv or linear op."""
        return self.layout is not None and len(self.wide) >= 2

    @property
    def constants(self) -> int:
        """How many of the layer's operands come before those of its terms, and have no gradient."""
        return sum(self.alpha) + sum(part is True for part in self.slices)

    @property
    def tensors(self) -> tuple[int, ...]:
        """How many tensors each term has."""
        return tuple(2 if code == LINE else 3 for code, _ in self.terms)

    def operands(self, tensors: Iterator[Tensor]) -> Operands:
        """Take this layer's tensors from the flat list."""
        alpha = tuple(next(tensors) if present else None for present in self.alpha)
        slices = tuple(next(tensors) if part is True else part or None for part in self.slices)
        terms: list[Term] = []
        for code, axis in self.terms:
            if code == LINE:
                terms.append(Line(next(tensors), next(tensors), axis))
            else:
                terms.append(_FILTERS[code](next(tensors), next(tensors), next(tensors)))
        return Operands(alpha, slices, tuple(terms))


def flatten(layer: Layer) -> list[Tensor]:
    """The layer's tensors but its weight, in the order in which `Recipe.operands` takes them."""
    tensors = [a for a in layer.alpha if a is not None]
    tensors += [s for s in layer.slices if isinstance(s, Tensor)]
    for term in layer.terms:
        tensors += term.tensors
    return tensors


def encode(layer: Layer, teacher: bool, student: bool) -> str:
    """What is known about the layer, as text for `parse`."""
    layout = layer.layout
    numbers: list[int] = [len(layer.shape), *layer.weight.shape, *layer.shape, int(teacher), int(student)]
    numbers += [int(_channels_last(layer.weight))]
    numbers += [0] if layout is None else [1, layout.groups, int(layout.transposed), layout.student_groups]
    numbers += [len(layer.terms)]
    for term in layer.terms:
        if isinstance(term, Line):
            numbers += [LINE, term.axis]
        else:
            numbers += [_FILTERS.index(type(term)), 0]
    numbers += [len(layer.alpha)]
    for alpha in layer.alpha:
        numbers += [int(alpha is not None)]
    for part in layer.slices:
        if isinstance(part, Tensor):
            numbers += [_INDEX]
        elif part is None:
            numbers += [_WHOLE]
        else:
            numbers += [_CUT, part.of, part.blocks, part.length]
    return " ".join([str(n) for n in numbers])


def _channels_last(weight: Tensor) -> bool:
    """Whether results shall be so; on the CPU they never are, since there is nothing to gain."""
    if weight.device.type == "cpu" or weight.dim() not in (4, 5) or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=torch.channels_last if weight.dim() == 4 else torch.channels_last_3d)


@functools.lru_cache(maxsize=64)
def parse(text: str) -> tuple[Recipe, ...]:
    """The recipes of all layers, one a line."""
    return tuple(_parse([int(n) for n in line.split(" ")]) for line in text.split("\n"))


def _parse(numbers: Sequence[int]) -> Recipe:
    left = iter(numbers)
    dims = next(left)
    wide = tuple(next(left) for _ in range(dims))
    shape = tuple(next(left) for _ in range(dims))
    teacher, student, last = bool(next(left)), bool(next(left)), bool(next(left))
    layout = KernelLayout(next(left), bool(next(left)), next(left)) if next(left) else None
    terms = tuple((next(left), next(left)) for _ in range(next(left)))
    alpha = tuple(bool(next(left)) for _ in range(next(left)))
    slices: list[Cut | bool | None] = []
    for _ in range(dims):
        kind = next(left)
        slices.append(Cut(next(left), next(left), next(left)) if kind == _CUT else True if kind == _INDEX else None)
    return Recipe(wide, layout, terms, alpha, tuple(slices), shape, teacher, student, last)
