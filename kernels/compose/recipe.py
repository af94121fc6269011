"""Layers as an operator can take them: a flat list of tensors, and a text that says what they are.

An operator's arguments are tensors and plain values, and its graph must not depend on Python objects. So everything
about the layers that is known before the step becomes a text of integers, which is read back once and remembered.

The tensors of terms are taken as parameters hold them, with the dimension of groups merged into the next: a view of
each of them, and its gradient, would take more time than all else that a step does on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpd_fx.kernels.compose.layout import Cut, KernelLayout, Slice
from gpd_fx.kernels.compose.terms import (
    InputFilter,
    Layer,
    Line,
    OutputFilter,
    Product,
    Term,
)

_FILTERS = (OutputFilter, InputFilter, Product)
OUTPUT_FILTER, INPUT_FILTER, PRODUCT, LINE = range(4)
"""The kinds of terms, by number; the first three have the tensors of `_FILTERS`."""
_WHOLE, _CUT, _INDEX = range(3)


class Operands(NamedTuple):
    """The tensors of one layer but its weight."""

    alpha: tuple[Tensor | None, ...]
    slices: tuple[Slice, ...]
    terms: tuple[Term, ...]


class Part(NamedTuple):
    """What is known about one term.

    Attributes:
        kind: its number.
        number: the axis of a line, the inner width of a product, or 0.
        last: whether the kernel of a product lies with its channels last.
    """

    kind: int
    number: int
    last: bool

    @staticmethod
    def of(term: Term) -> Part:
        """What is known about a term."""
        if isinstance(term, Line):
            return Part(LINE, term.axis, False)
        if isinstance(term, Product):
            return Part(PRODUCT, term.point.shape[1], channels_last(term.kernel.flatten(0, 1)))
        return Part(_FILTERS.index(type(term)), 0, False)

    @property
    def tensors(self) -> int:
        """How many tensors it has."""
        return 2 if self.kind == LINE else 3


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is known about one layer before the step; equal only to itself, since `parse` makes each but once.

    Attributes:
        wide: the shape of the weight.
        layout: how it is used as a kernel.
        terms: its terms.
        alpha: which dimensions have a factor.
        slices: a cut, True for an index, None for the whole dimension.
        shape: the student's shape.
        last: whether the weight lies with its channels last, and so shall what is made of it.
        teacher, student: which of the two tensors are asked for.
    """

    wide: tuple[int, ...]
    layout: KernelLayout | None
    terms: tuple[Part, ...]
    alpha: tuple[bool, ...]
    slices: tuple[Cut | bool | None, ...]
    shape: tuple[int, ...]
    last: bool
    teacher: bool = True
    student: bool = True

    @property
    def idle(self) -> bool:
        """Whether both networks have the weight as it is."""
        return not (self.terms or any(self.alpha) or any(part is not None for part in self.slices))

    @staticmethod
    def of(layer: Layer) -> Recipe:
        """What is known about a layer."""
        return Recipe(
            tuple(layer.weight.shape),
            layer.layout,
            tuple([Part.of(term) for term in layer.terms]),
            tuple([alpha is not None for alpha in layer.alpha]),
            tuple([True if isinstance(part, Tensor) else part for part in layer.slices]),
            layer.shape,
            layer.layout is not None and channels_last(layer.weight),
        )

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
    def results(self) -> int:
        """How many tensors are made of the layer."""
        return self.teacher + self.student

    def shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        """The shape of each of its terms' tensors, and whether it lies with its channels last."""
        if not self.terms:
            return []
        assert self.layout is not None
        g, o, i, *kernel = self.layout.canonical_shape(self.wide)
        found: list[tuple[tuple[int, ...], bool]] = []
        for kind, number, last in self.terms:
            found.append(((g * o,), False))
            if kind == LINE:
                found.append(((g * o, i, kernel[number]), False))
            elif kind == PRODUCT:
                found += [((g * number, i), False), ((g * o, number, *kernel), last)]
            else:
                found += [((g * o, i), False), ((g * (o if kind == OUTPUT_FILTER else i), *kernel), False)]
        return found

    def operands(self, tensors: Iterator[Tensor]) -> Operands:
        """Take this layer's tensors from the flat list."""
        alpha = tuple([next(tensors) if present else None for present in self.alpha])
        slices = tuple([next(tensors) if part is True else part or None for part in self.slices])
        terms: list[Term] = []
        for part in self.terms:
            assert self.layout is not None
            own = [next(tensors).unflatten(0, (self.layout.groups, -1)) for _ in range(part.tensors)]
            terms.append(Line(*own, axis=part.number) if part.kind == LINE else _FILTERS[part.kind](*own))
        return Operands(alpha, slices, tuple(terms))


def flatten(layer: Layer) -> list[Tensor]:
    """The layer's tensors but its weight, in the order in which `Recipe.operands` takes them."""
    tensors = [a for a in layer.alpha if a is not None]
    tensors += [s for s in layer.slices if isinstance(s, Tensor)]
    for term in layer.terms:
        tensors += [tensor.flatten(0, 1) for tensor in term.tensors]
    return tensors


def encode(recipe: Recipe, teacher: bool = True, student: bool = True) -> str:
    """The recipe, of which these tensors are asked for, as text for `parse`."""
    layout = recipe.layout
    numbers: list[int] = [len(recipe.shape), *recipe.wide, *recipe.shape]
    numbers += [int(recipe.last), int(teacher), int(student)]
    numbers += [0] if layout is None else [1, layout.groups, int(layout.transposed), layout.student_groups]
    numbers += [len(recipe.terms)]
    for kind, number, last in recipe.terms:
        numbers += [kind, number, int(last)]
    numbers += [len(recipe.alpha)]
    for present in recipe.alpha:
        numbers += [int(present)]
    for part in recipe.slices:
        if part is True:
            numbers += [_INDEX]
        elif isinstance(part, Cut):
            numbers += [_CUT, part.of, part.blocks, part.length]
        else:
            numbers += [_WHOLE]
    return " ".join([str(n) for n in numbers])


def channels_last(tensor: Tensor) -> bool:
    """Whether what is made of a tensor shall lie so; on the CPU never, since there is nothing to gain."""
    if tensor.device.type == "cpu" or tensor.dim() not in (4, 5) or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)


@functools.lru_cache(maxsize=64)
def parse(text: str) -> tuple[Recipe, ...]:
    """The recipes of all layers, one a line."""
    return tuple(_parse([int(n) for n in line.split(" ")]) for line in text.split("\n"))


class Starts(NamedTuple):
    """The first operand of a layer, and the first of the tensors that are made of it."""

    operand: int
    result: int


@functools.lru_cache(maxsize=64)
def starts_of(text: str) -> tuple[Starts, ...]:
    """Where each layer's tensors start among those of all, and after them the end."""
    operand, result = 0, 0
    found: list[Starts] = []
    for recipe in parse(text):
        found.append(Starts(operand, result))
        operand += recipe.constants + sum(part.tensors for part in recipe.terms)
        result += recipe.results
    return (*found, Starts(operand, result))


def _parse(numbers: Sequence[int]) -> Recipe:
    left = iter(numbers)
    dims = next(left)
    wide = tuple(next(left) for _ in range(dims))
    shape = tuple(next(left) for _ in range(dims))
    last, teacher, student = bool(next(left)), bool(next(left)), bool(next(left))
    layout = KernelLayout(next(left), bool(next(left)), next(left)) if next(left) else None
    terms = tuple(Part(next(left), next(left), bool(next(left))) for _ in range(next(left)))
    alpha = tuple(bool(next(left)) for _ in range(next(left)))
    slices: list[Cut | bool | None] = []
    for _ in range(dims):
        kind = next(left)
        slices.append(Cut(next(left), next(left), next(left)) if kind == _CUT else True if kind == _INDEX else None)
    return Recipe(wide, layout, terms, alpha, tuple(slices), shape, last, teacher, student)
